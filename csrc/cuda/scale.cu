#include "scale.cuh"

namespace kl_kernels {

cudaError_t scale(const Rows& rows, const GradLogits& gradient, Dtype dtype, const float* factor,
                  cudaStream_t stream) {
  return launch_scale<LaunchPolicy>(rows, gradient, dtype, factor, stream);
}

}  // namespace kl_kernels
