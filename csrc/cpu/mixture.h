// The second look at a row and its reference, once both are finished: its divergence from their
// mixture, and the gradient of that. One loop each: measured from anchors near the maxima and
// bounded by the mixture's algebra, -inf needs no care, and NaN is seen in the row's state already.
#pragma once

#include "../common/mixture.h"
#include "blocks.h"

namespace kl_kernels {
namespace {

// Calls `in_place(block, x, y)` with pointers to the logits, or `staged(block)` once they are
// staged in `x` and `y` as floats, padded with -inf.
template <class InPlace, class InStage>
void for_each_block(const Row& policy, const Row& reference, int64_t vocab_size,
                    bool may_be_in_place, Staged& x, Staged& y, const InPlace& in_place,
                    const InStage& staged) {
  may_be_in_place = may_be_in_place && read_in_place(policy, reference);
  const auto where_they_lie = [&]<class T>(Block block, T) {
    in_place(block, logits_of<T>(policy, block.start), logits_of<T>(reference, block.start));
  };
  for (int64_t start = 0; start < vocab_size; start += kBlock) {
    const Block block = block_at(start, vocab_size);
    if (!may_be_in_place || block.size % kPair != 0) {
      x.stage(policy, block, -INFINITY);
      y.stage(reference, block, -INFINITY);
      staged(block);
    } else if (policy.dtype == Dtype::float32) {
      where_they_lie(block, float{});
    } else if (policy.dtype == Dtype::bfloat16) {
      where_they_lie(block, BFloat16{});
    } else {
      where_they_lie(block, Float16{});
    }
  }
}

struct VectorFunctions {
  KL_INLINE static Floats all(float x) { return Floats{} + x; }
  KL_INLINE static Floats magnitude(Floats x) { return x < 0 ? -x : x; }
  KL_INLINE static Power<Floats> exp2(Floats t) {
    const Floats less_one = exp2m1(t);
    return {less_one + 1, less_one};
  }
  KL_INLINE static Floats log2p1(Floats u) { return kl_kernels::log2p1(u); }
};

inline void measure(const Row& policy, const Row& reference, const FinishedPair& of, Block block,
                    Staged& x, Staged& y) {
  x.measure(block, policy.k, of.policy.anchor);
  y.measure(block, reference.k, of.ref.anchor);
}

// How the rows are measured, in the loops' own precision.
// Far rows are measured where they are staged.
struct MixtureScale {
  const bool far;
  float kx, anchor, ky, ref_anchor;
  Mixture<float> mixture;

  MixtureScale(const Row& policy, const Row& reference, const FinishedPair& of)
      : far(of.far),
        kx(far ? 1 : policy.k),
        anchor(far ? 0 : float(of.policy.anchor)),
        ky(far ? 1 : reference.k),
        ref_anchor(far ? 0 : float(of.ref.anchor)),
        mixture(mixture_of<float>(of.policy.sum, of.ref.sum, of.beta)) {}

  KL_INLINE Beside<Floats> beside(Floats x, Floats y) const {
    return beside_mixture<VectorFunctions>(mixture, from_anchor(x, kx, anchor),
                                           from_anchor(y, ky, ref_anchor));
  }
};

MixtureSums<double> mix_row(const Row& policy, const Row& reference, int64_t vocab_size,
                            const FinishedPair& of) {
  const MixtureScale scale(policy, reference, of);
  double jsd = 0, kl = 0;
  const auto add = [&](const auto* x, const auto* y, int64_t n, int64_t ahead) {
    CompensatedSum block_jsd;
    Floats block_kl{};
    const auto absorb = [&](Floats xs, Floats ys) __attribute__((always_inline)) {
      const Beside<Floats> b = scale.beside(xs, ys);
      const Floats larger = exp2(b.larger);
      block_kl += larger * b.p * b.policy;
      return larger * b.jsd;
    };
    for (int64_t i = 0; i < n; i += kPair) {
      const Pair xs = load_pair(x + i, ahead), ys = load_pair(y + i, ahead);
      const Floats first = absorb(xs.first, ys.first);
      block_jsd.add(first + absorb(xs.second, ys.second));
    }
    jsd += block_jsd.total();
    kl += total(block_kl);
  };
  Staged x, y;
  for_each_block(
      policy, reference, vocab_size, !of.far, x, y,
      [&]<class T>(Block block, const T* xs, const T* ys) {
        add(xs, ys, block.size, bytes_ahead<T>(block, vocab_size));
      },
      [&](Block block) {
        if (of.far) measure(policy, reference, of, block, x, y);
        add(x.values, y.values, whole_pairs(block.size), kStagedAhead);
      });
  return finish_mixture(jsd, kl, of.policy.sum, scale.mixture.shift);
}

void mix_row_backward(const Row& policy, const Row& reference, int64_t vocab_size,
                      const FinishedPair& of, const MixtureSlope<double>& slope,
                      void* grad_logits) {
  const MixtureScale scale(policy, reference, of);
  const float a = float(slope.a), b = float(slope.b);
  const auto write = [&](const auto* x, const auto* y, auto* grad, int64_t n, int64_t ahead) {
    const auto gradient = [&](Floats xs, Floats ys) __attribute__((always_inline)) {
      const Beside<Floats> beside = scale.beside(xs, ys);
      return exp2(beside.larger) * beside.p * (b * beside.policy + a);
    };
    for (int64_t i = 0; i < n; i += kPair) {
      const Pair xs = load_pair(x + i, ahead), ys = load_pair(y + i, ahead);
      store_pair(grad + i, {gradient(xs.first, ys.first), gradient(xs.second, ys.second)});
    }
  };
  Staged x, y, grad;
  // Vectors of bfloat16 are rounded as finite numbers.
  for_each_block(
      policy, reference, vocab_size, is_finite(slope.a + slope.b) && !of.far, x, y,
      [&]<class T>(Block block, const T* xs, const T* ys) {
        write(xs, ys, static_cast<T*>(grad_logits) + block.start, block.size,
              bytes_ahead<T>(block, vocab_size));
      },
      [&](Block block) {
        if (of.far) measure(policy, reference, of, block, x, y);
        write(x.values, y.values, grad.values, whole_pairs(block.size), kStagedAhead);
        if (of.far) x.stage(policy, block, -INFINITY);  // for the softcap's derivative
        write_gradient(policy, x, grad, block, grad_logits);
      });
}

}  // namespace
}  // namespace kl_kernels
