// scale_gradient: a gradient multiplied in place by a number in device memory.
#pragma once

#include "part.cuh"

namespace kl_kernels {

// CUDA kernels

// A grid that does not grow with the gradient: where the factor is 1, its launch is all it costs.
template <class Policy, class T>
__global__ void __launch_bounds__(Policy::kThreads)
    scale_kernel(Rows rows, Split split, Logits gradient, GradLogits grad_logits,
                 const float* factor) {
  const float by = *factor;
  if (by == 1) return;
  const int64_t n_parts = rows.n_rows * split.n_parts;
  for (int64_t i = blockIdx.x; i < n_parts; i += gridDim.x) {
    const SplitOfRow place = split_of_row(static_cast<uint32_t>(i), rows, split);
    const auto grad = grad_row_of<T>(rows, gradient, grad_logits, place);
    const auto part = aligned_to(grad, part_of<Row<T>, false>(rows, gradient, gradient, place));
    const auto each_vector = [&](int at, const auto& xs, const auto&) {
      float x[kLanes];
      unpack(xs, x);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) x[j] *= by;
      grad.put_vector(at, x, x);
    };
    for_each<Policy, true>(part, each_vector,
                           [&](int at, float x, float) { grad.put(at, x * by, x); });
  }
}

// Launchers

template <class Policy>
cudaError_t launch_scale(const Rows& rows, const GradLogits& gradient, Dtype dtype,
                         const float* factor, cudaStream_t stream) {
  const Logits read{gradient.data, dtype, gradient.stride_b, gradient.stride_t, 1, 0};
  const Split split = split_of<Policy>(rows.vocab_size);
  const int64_t n_parts = rows.n_rows * split.n_parts;
  const int64_t n_blocks = n_parts < Policy::kScaleBlocks ? n_parts : Policy::kScaleBlocks;
  return with_element_type(read, Logits{}, [&](auto element) {
    using T = decltype(element);
    return launch(scale_kernel<Policy, T>, {n_blocks, Policy::kThreads}, stream, rows, split, read,
                  gradient, factor);
  });
}

}  // namespace kl_kernels
