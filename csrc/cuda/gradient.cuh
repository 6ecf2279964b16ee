// The gradient of one part of a row, once the row is finished: one look at its logits, one write.
#pragma once

#include "part.cuh"

namespace kl_kernels {

// The statistics that a row's gradient depends on decide what is read: nothing (it is 0), the
// policy alone, or the reference, too.
enum class Terms { none, policy, kl, both_kls };

struct RowGradient {
  Coefficients<float> c;
  float anchor, ref_anchor;
  float own;  // the sampled token's share, g_logprob / temperature
  Terms terms;
};

// From the row's states and outputs, in float64; without a reference its state is {0, 1, 0}.
__device__ inline RowGradient row_gradient(const Upstream<double>& g,
                                           const Anchored<double>& policy, Anchored<double> ref,
                                           double kl, double entropy, double over_temperature) {
  if (g.kl != 0) ref = centred(ref, policy.ln_of_sum, kl);
  const Coefficients<double> c = coefficients(g, policy, ref, kl, entropy, over_temperature);
  return {{static_cast<float>(c.a), static_cast<float>(c.b), static_cast<float>(c.c),
           static_cast<float>(c.d)},
          static_cast<float>(policy.anchor),
          static_cast<float>(ref.anchor),
          static_cast<float>(g.logprob * over_temperature),
          is_zero(g)          ? Terms::none
          : g.forward_kl != 0 ? Terms::both_kls
          : g.kl != 0         ? Terms::kl
                              : Terms::policy};
}

// The gradient of one logit, all but the token's own share.
template <Terms kTerms>
__device__ __forceinline__ float gradient(const RowGradient& r, float kx, float ky, float x,
                                          float y) {
  const float tx = from_anchor(x, kx, r.anchor), w = exp2f(tx);
  if constexpr (kTerms == Terms::policy) return backward(r.c, tx, w);
  const float ty = from_anchor(y, ky, r.ref_anchor);
  if constexpr (kTerms == Terms::kl) return backward(r.c, tx, ty, w);
  return backward(r.c, tx, ty, w, exp2f(ty));
}

// Writes one part's gradient. `token` is relative to the part and may be out of range. In place is
// safe: each thread reads exactly the elements that it writes later.
template <class Policy, bool kAligned, Terms kTerms, Order kOrder, class R, bool kHasRef, class T>
__device__ void write_gradient(const Part<R, kHasRef>& part, const RowGradient& r,
                               const GradRow<T>& grad, int64_t token) {
  const bool own = token >= 0 && token < part.span.size && owns<Policy>(token, part.span);
  float own_x = 0, own_grad = 0;
  if (own) {
    own_x = fmaxf(part.x[token], kLowest);
    const float y = kHasRef ? fmaxf(part.y[token], kLowest) : own_x;
    own_grad = gradient<kTerms>(r, part.kx, part.ky, own_x, y) + r.own;
  }
  const auto each_vector = [&](int i, const auto& xs, const auto& ys) {
    float x[kLanes], y[kLanes], g[kLanes];
    unpack_finite(xs, x);
    unpack_finite(ys, y);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) g[j] = gradient<kTerms>(r, part.kx, part.ky, x[j], y[j]);
    grad.put_vector(i, g, x);
  };
  const auto one = [&](int i, float x, float y) {
    x = fmaxf(x, kLowest);
    y = fmaxf(y, kLowest);
    grad.put(i, gradient<kTerms>(r, part.kx, part.ky, x, y), x);
  };
  for_each<Policy, kAligned, kOrder>(part, each_vector, one);
  // The token's entry once more, by the thread that wrote it: any other would race with that one.
  if (own) grad.put(token, own_grad, own_x);
}

}  // namespace kl_kernels
