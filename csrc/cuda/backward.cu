#include "backward.cuh"

namespace kl_kernels {

cudaError_t backward(const Rows& rows, const Logits& policy, const Logits& reference,
                     const Saved& saved, const GradLogits& grad_logits, cudaStream_t stream) {
  return launch_backward<LaunchPolicy>(rows, policy, reference, saved, grad_logits, stream);
}

}  // namespace kl_kernels
