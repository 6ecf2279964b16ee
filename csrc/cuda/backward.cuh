// The backward pass: the gradient of any mix of the forward's outputs, in one more read of the
// logits and one write. Without a gradient of either KL the reference's logits are not read.
#pragma once

#include "part.cuh"

namespace kl_kernels {

// Whose gradient is asked for decides what has to be read and computed.
enum class Terms { policy, kl, both_kls };

// What a block needs of its row besides the logits.
struct RowGradient {
  Coefficients<float> c;
  float anchor, ref_anchor;
  float own;  // the sampled token's share, g_logprob / temperature
};

__device__ inline double value_or_zero(const float* values, int64_t at) {
  return values == nullptr ? 0.0 : values[at];
}

// In float64, by one thread per block.
template <Terms kTerms>
__device__ void set_gradient(const Rows& rows, const Saved& saved, uint32_t row, RowGradient& r) {
  constexpr bool kReference = kTerms != Terms::policy;
  Upstream<double> g{};
  g.logprob = value_or_zero(saved.grad_logprob, row);
  // A token outside the vocabulary shows, unless nobody asks for its gradient.
  if (g.logprob != 0 && !in_vocabulary(rows, rows.token_ids[row])) g.logprob = NAN;
  g.entropy = value_or_zero(saved.grad_entropy, row);
  const double sx = saved.policy_state[rows.n_rows + row], entropy = saved.entropy[row];
  Anchored<double> ref{0, 1};
  double kl = 0;
  if constexpr (kReference) {
    g.kl = value_or_zero(saved.grad_kl, row);
    g.forward_kl = value_or_zero(saved.grad_forward_kl, row);
    ref = {saved.ref_state[row], saved.ref_state[rows.n_rows + row]};
    kl = saved.kl[row];
    if (g.kl != 0) ref = centred(ref, sx, kl);
  }
  const Coefficients<double> c = coefficients(g, sx, ref.sum, kl, entropy, saved.temperature);
  r.c.a = static_cast<float>(c.a);
  r.c.b = static_cast<float>(c.b);
  r.c.c = static_cast<float>(c.c);
  r.c.d = static_cast<float>(c.d);
  r.anchor = saved.policy_state[row];
  r.ref_anchor = static_cast<float>(ref.anchor);
  r.own = static_cast<float>(g.logprob / saved.temperature);
}

// The gradient of one logit, all but the token's own share.
template <Terms kTerms, class P>
__device__ __forceinline__ float gradient(const RowGradient& r, const P& part, float x, float y) {
  const float tx = from_anchor(x, part.kx, r.anchor), w = exp2f(tx);
  if constexpr (kTerms == Terms::policy) return backward(r.c, tx, w);
  const float ty = from_anchor(y, part.ky, r.ref_anchor);
  if constexpr (kTerms == Terms::kl) return backward(r.c, tx, ty, w);
  return backward(r.c, tx, ty, w, exp2f(ty));
}

// Whether it is this thread that for_each brings to the part's logit `token`.
template <class Policy>
__device__ bool visits(int token, int whole) {
  const int index = token < whole ? token / kLanes : token - whole;
  return index % Policy::kThreads == static_cast<int>(threadIdx.x);
}

template <class Policy, bool kAligned, Terms kTerms, class T, bool kReference>
__device__ void backward_part(const Part<T, kReference>& part, const RowGradient& r,
                              const GradRow<T>& grad, int64_t token) {
  const auto eight = [&](int i, const auto& xs, const auto& ys) {
    float x[kLanes], y[kLanes], g[kLanes];
    unpack_finite(xs, x);
    unpack_finite(ys, y);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) g[j] = gradient<kTerms>(r, part, x[j], y[j]);
    grad.template put_eight<kAligned>(i, g, x);
  };
  const auto one = [&](int i, float x, float y) {
    x = fmaxf(x, kLowest);
    y = fmaxf(y, kLowest);
    grad.put(i, gradient<kTerms>(r, part, x, y), x);
  };
  for_each<Policy, kAligned>(part, eight, one);

  // The token's entry once more, by the thread that wrote it: any other would race with that one.
  if (token < 0 || token >= part.size || !visits<Policy>(token, part.whole())) return;
  const float x = fmaxf(part.x[token], kLowest), y = fmaxf(part.y[token], kLowest);
  grad.put(token, gradient<kTerms>(r, part, x, y) + r.own, x);
}

template <class Policy, bool kAligned, class T>
__device__ void zero_part(const GradRow<T>& grad, int size) {
  const int whole = size / kLanes * kLanes;
  float zeros[kLanes] = {};
  for (int i = threadIdx.x * kLanes; i < whole; i += Policy::kThreads * kLanes)
    grad.template put_eight<kAligned>(i, zeros, zeros);
  const int i = whole + threadIdx.x;
  if (i < size) grad.put(i, 0.0f, 0.0f);
}

// CUDA kernels

// One block per part of a row.
template <class Policy, class T, Terms kTerms>
__global__ void __launch_bounds__(Policy::kThreads, kBlocks<Policy, T>)
    backward_kernel(Rows rows, Split split, Logits policy, Logits reference, Saved saved,
                    void* grad_logits) {
  const Place place = place_of_block(split);
  const uint32_t row = place.row;
  const GradRow<T> grad(grad_logits, policy, row * rows.vocab_size + place.begin);
  const auto part = part_of<T, kTerms != Terms::policy>(rows, split, policy, reference, place);
  if (!counts(rows, row)) {
    grad.aligned() ? zero_part<Policy, true>(grad, part.size)
                   : zero_part<Policy, false>(grad, part.size);
    return;
  }
  __shared__ RowGradient of_row;
  if (threadIdx.x == 0) set_gradient<kTerms>(rows, saved, row, of_row);
  __syncthreads();  // without it the others would use coefficients that are not there yet
  const RowGradient r = of_row;  // in registers, not read again for every logit
  const int64_t token = rows.token_ids[row] - place.begin;
  if (grad.aligned() && part.x.aligned() && part.y.aligned())
    backward_part<Policy, true, kTerms>(part, r, grad, token);
  else
    backward_part<Policy, false, kTerms>(part, r, grad, token);
}

// Launchers

template <class Policy>
cudaError_t launch_backward(const Rows& rows, const Logits& policy, const Logits& reference,
                            const Saved& saved, void* grad_logits, cudaStream_t stream) {
  const bool any_kl = saved.grad_kl != nullptr || saved.grad_forward_kl != nullptr;
  const Logits read = any_kl ? reference : Logits{};
  const Split split = split_of<Policy>(rows.vocab_size);
  return with_element_type(policy, read, [&](auto element) {
    using T = decltype(element);
    const auto kernel = !any_kl ? backward_kernel<Policy, T, Terms::policy>
                        : saved.grad_forward_kl == nullptr
                            ? backward_kernel<Policy, T, Terms::kl>
                            : backward_kernel<Policy, T, Terms::both_kls>;
    return launch(kernel, rows.n_rows * split.n_parts, Policy::kThreads, stream, rows, split,
                  policy, read, saved, grad_logits);
  });
}

}  // namespace kl_kernels
