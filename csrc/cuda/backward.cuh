// The backward pass: the gradient of any mix of the forward's outputs, in one more read of the
// logits and one write. Without a gradient of either KL the reference's logits are not read.
#pragma once

#include "gradient.cuh"

namespace kl_kernels {

__device__ inline double value_or_zero(const float* values, int64_t at) {
  return values == nullptr ? 0.0 : values[at];
}

// By one thread per block.
template <bool kHasRef>
__device__ RowGradient saved_gradient(const Rows& rows, const Saved& saved, uint32_t row) {
  Upstream<double> g{};
  g.logprob = value_or_zero(saved.grad_logprob, row);
  // A token outside the vocabulary shows, unless nobody asks for its gradient.
  const int64_t token = rows.token_ids[row];
  const bool outside = saved.part && token == kNoToken;
  if (g.logprob != 0 && !in_vocabulary(rows, token) && !outside) g.logprob = NAN;
  g.entropy = value_or_zero(saved.grad_entropy, row);
  const Anchored<double> policy =
      anchored<double>(saved.policy_state[row], saved.policy_state[rows.n_rows + row]);
  Anchored<double> ref{0, 1, 0};
  double kl = 0;
  if constexpr (kHasRef) {
    g.kl = value_or_zero(saved.grad_kl, row);
    g.forward_kl = value_or_zero(saved.grad_forward_kl, row);
    ref = anchored<double>(saved.ref_state[row], saved.ref_state[rows.n_rows + row]);
    kl = saved.kl[row];
  }
  return row_gradient(g, policy, ref, kl, saved.entropy[row], 1 / saved.temperature);
}

// CUDA kernels

// One block per part of a row. kTerms is the most that any row asks for.
template <class Policy, class T, Terms kTerms>
__global__ void __launch_bounds__(Policy::kThreads, kBlocks<Policy, T>)
    backward_kernel(Rows rows, Split split, Logits policy, Logits reference, Saved saved,
                    GradLogits grad_logits) {
  constexpr bool kHasRef = kTerms != Terms::policy;
  const SplitOfRow place = split_of_row(blockIdx.x, rows, split);
  const uint32_t row = place.row;
  const auto grad = grad_row_of<T>(rows, policy, grad_logits, place);
  if (!counts(rows, row)) return write_zeros<Policy>(grad, place.size);
  __shared__ RowGradient of_row;
  if (threadIdx.x == 0) {
    // Copied, because ThreadSanitizer does not see what a function returns into memory.
    const RowGradient computed = saved_gradient<kHasRef>(rows, saved, row);
    of_row = computed;
  }
  __syncthreads();  // without it the others would use coefficients that are not there yet
  const RowGradient r = of_row;  // in registers, not read again for every logit
  if (r.terms == Terms::none) return write_zeros<Policy>(grad, place.size);
  const auto part = aligned_to(grad, part_of<Row<T>, kHasRef>(rows, policy, reference, place));
  const int64_t token = rows.token_ids[row] - place.begin;
  if (part.aligned())
    write_gradient<Policy, true, kTerms, Order::forwards>(part, r, grad, token);
  else
    write_gradient<Policy, false, kTerms, Order::forwards>(part, r, grad, token);
}

// Launchers

template <class Policy>
cudaError_t launch_backward(const Rows& rows, const Logits& policy, const Logits& reference,
                            const Saved& saved, const GradLogits& grad_logits,
                            cudaStream_t stream) {
  const bool any_kl = saved.grad_kl != nullptr || saved.grad_forward_kl != nullptr;
  const Logits read = any_kl ? reference : Logits{};
  const Split split = split_of<Policy>(rows.vocab_size);
  return with_element_type(policy, read, [&](auto element) {
    using T = decltype(element);
    const auto kernel = !any_kl ? backward_kernel<Policy, T, Terms::policy>
                        : saved.grad_forward_kl == nullptr
                            ? backward_kernel<Policy, T, Terms::kl>
                            : backward_kernel<Policy, T, Terms::both_kls>;
    return launch(kernel, {rows.n_rows * split.n_parts, Policy::kThreads}, stream, rows, split,
                  policy, read, saved, grad_logits);
  });
}

}  // namespace kl_kernels
