// One row's state: a fast loop around fixed anchors, and a careful one for whatever defeats it.
#pragma once

#include "blocks.h"

namespace kl_kernels {
namespace {

// A sum and what rounding took from it. Equal weights (a flat row) lose the same part of a unit at
// every addition, and KL is the difference of the logarithms of two such sums.
struct CompensatedSum {
  Floats sum{}, lost{};

  KL_INLINE void add(Floats value) {  // no larger than the sum, but for the first few
    const Floats next = sum + value;
    lost += value - (next - sum);
    sum = next;
  }
  double total() const { return kl_kernels::total(sum) + kl_kernels::total(lost); }
};

// Logits measured from an anchor, and their weights.
struct Weighed {
  Floats t, weight;
};
struct Weights {
  Floats x, y;
};
template <bool kGuarded>
KL_INLINE Weighed weigh(Floats logits, float k, float anchor) {
  const Floats t = position<kGuarded>(logits, k, anchor);
  return {t, exp2(t)};
}

// Sums of a block, and whether one model rules out what the other does not: then a KL is infinite.
struct BlockSums {
  Sums<double> sums;
  bool kl_is_infinite = false, forward_kl_is_infinite = false;

  KL_INLINE void compare_support(Ints only_reference, Ints only_policy) {
    for (int i = 0; i < kLanes; ++i) {
      kl_is_infinite |= only_reference[i] != 0;
      forward_kl_is_infinite |= only_policy[i] != 0;
    }
  }
};

// The vocabulary loop: no maximum, no rescaling, no test. Anything out of the ordinary (NaN, a peak
// far above the anchor and, unguarded, -inf) shows in the sums.
template <bool kGuarded, class T>
BlockSums fold_fast(const T* x, const T* y, int64_t n, float kx, float anchor, float ky,
                    float ref_anchor) {
  CompensatedSum sx, sy;
  Sums<Floats> s{};                      // but for sx and sy
  Ints only_reference{}, only_policy{};  // rules a token out
  const auto fold = [&](Floats xs, Floats ys) __attribute__((always_inline)) {
    const Weighed of_x = weigh<kGuarded>(xs, kx, anchor),
                  of_y = weigh<kGuarded>(ys, ky, ref_anchor);
    fold_moments(s, of_x.t, of_y.t, of_x.weight, of_y.weight);
    if (kGuarded) {
      only_reference |= (ys == -INFINITY) & (xs != -INFINITY);
      only_policy |= (xs == -INFINITY) & (ys != -INFINITY);
    }
    return Weights{of_x.weight, of_y.weight};
  };
  for (int64_t i = 0; i < n; i += kPair) {
    const Pair xs = load_pair(x + i), ys = load_pair(y + i);
    const Weights first = fold(xs.first, ys.first), second = fold(xs.second, ys.second);
    sx.add(first.x + second.x);
    sy.add(first.y + second.y);
  }
  BlockSums result{{sx.total(), sy.total(), total(s.ex), total(s.rk), total(s.fk)}};
  if (kGuarded) result.compare_support(only_reference, only_policy);
  return result;
}

// The same without a reference.
template <bool kGuarded, class T>
BlockSums fold_fast(const T* x, int64_t n, float kx, float anchor) {
  CompensatedSum sx;
  Sums<Floats> s{};
  for (int64_t i = 0; i < n; i += kPair) {
    const Pair xs = load_pair(x + i);
    const Weighed x1 = weigh<kGuarded>(xs.first, kx, anchor);
    const Weighed x2 = weigh<kGuarded>(xs.second, kx, anchor);
    fold_moments(s, x1.t, x1.weight);
    fold_moments(s, x2.t, x2.weight);
    sx.add(x1.weight + x2.weight);
  }
  return {{sx.total(), 0, total(s.ex), 0, 0}};
}

// In float64, with the block's own maxima as anchors and -inf handled by support.
inline Sums<double> fold_careful(const float* x, const float* y, int64_t n, double kx,
                                 double anchor, double ky, double ref_anchor) {
  constexpr double kFloor = Limits<double>::kFloor;
  Sums<Doubles> s{};
  for (int64_t i = 0; i < n; i += kWideLanes) {
    const Doubles xs = widen(x + i), ys = widen(y + i);
    Doubles tx = from_anchor(xs, kx, anchor), ty = from_anchor(ys, ky, ref_anchor);
    tx = tx < kFloor ? Doubles{} + kFloor : tx;
    ty = ty < kFloor ? Doubles{} + kFloor : ty;
    fold_by_support(s, xs, ys, tx, ty, exp2(tx), exp2(ty));
  }
  return {total(s.sx), total(s.sy), total(s.ex), total(s.rk), total(s.fk)};
}

class RowFold {
 public:
  RowFold(const Row& policy, const Row& reference)
      : policy_(policy), reference_(reference), in_place_(read_in_place(policy, reference)) {}

  RowState<double> operator()(int64_t vocab_size, int64_t token) {
    const auto block_at = [&](int64_t start) {
      return Block{start, vocab_size - start < kBlock ? vocab_size - start : kBlock};
    };
    // The sampled token is nearly always close to the top, wherever that is.
    RowState<double> state = empty_state<double>();
    if (token != kNoToken) state = raise_anchors(state, {token, 1});
    state = raise_anchors(state, block_at(0));
    bool guarded = false;  // from the first -inf on
    for (int64_t start = 0; start < vocab_size; start += kBlock) {
      const Block block = block_at(start);
      RowState<double> part = state;
      bool done = !guarded && fast<false>(block, part);
      if (!done) done = guarded = fast<true>(block, part = state);
      if (!done) careful(block, part = state);
      state = merge(state, part);
    }
    return state;
  }

 private:
  bool alone() const { return reference_.logits == nullptr; }

  // Sums of the block into `part`, around its anchors or higher ones; false if that will not do.
  template <bool kGuarded>
  bool fast(Block block, RowState<double>& part) {
    BlockSums found = fast_sums<kGuarded>(block, part);
    part.sums = found.sums;
    if (!is_finite(part)) return false;
    // Many or large weights. What matters is that none of them lies far above its anchor: t has
    // an absolute error of 2^-24 t, and so has the KL.
    constexpr double kCrowded = kBlock / 8;
    if (part.sums.sx > kCrowded || part.sums.sy > kCrowded) {
      const RowState<double> raised = raise_anchors(part, block);
      if (raised.anchor > part.anchor || raised.ref_anchor > part.ref_anchor) {
        part = raised;
        found = fast_sums<kGuarded>(block, part);
        part.sums = found.sums;
      }
      if (!is_finite(part)) return false;
    }
    if (found.kl_is_infinite) part.sums.rk = INFINITY;
    if (found.forward_kl_is_infinite) part.sums.fk = INFINITY;
    return true;
  }

  void careful(Block block, RowState<double>& part) {
    part = raise_anchors(part, block);  // stages the block, too
    const Staged& y = alone() ? x_ : y_;
    part.sums =
        fold_careful(x_.values, y.values, whole_pairs(block.size), policy_.k, part.anchor,
                     alone() ? policy_.k : reference_.k, alone() ? part.anchor : part.ref_anchor);
  }

  template <bool kGuarded>
  BlockSums fast_sums(Block block, const RowState<double>& anchors) {
    const float anchor = float(anchors.anchor), ref_anchor = float(anchors.ref_anchor);
    if (in_place_ && block.size % kPair == 0) {
      switch (policy_.dtype) {
        case Dtype::float32:
          return fast_sums<kGuarded, float>(block, anchor, ref_anchor);
        case Dtype::bfloat16:
          return fast_sums<kGuarded, BFloat16>(block, anchor, ref_anchor);
        case Dtype::float16:
          return fast_sums<kGuarded, Float16>(block, anchor, ref_anchor);
      }
    }
    stage(block, far_below(anchor, policy_.k), far_below(ref_anchor, reference_.k));
    return fast_sums<kGuarded>(x_.values, y_.values, whole_pairs(block.size), anchor, ref_anchor);
  }

  template <bool kGuarded, class T>
  BlockSums fast_sums(Block block, float anchor, float ref_anchor) {
    return fast_sums<kGuarded>(logits_of<T>(policy_, block.start),
                               logits_of<T>(reference_, block.start), block.size, anchor,
                               ref_anchor);
  }

  template <bool kGuarded, class T>
  BlockSums fast_sums(const T* x, const T* y, int64_t n, float anchor, float ref_anchor) {
    return alone() ? fold_fast<kGuarded>(x, n, policy_.k, anchor)
                   : fold_fast<kGuarded>(x, y, n, policy_.k, anchor, reference_.k, ref_anchor);
  }

  void stage(Block block, float padding, float ref_padding) {
    x_.stage(policy_, block, padding);
    if (!alone()) y_.stage(reference_, block, ref_padding);
  }

  // The same anchors, or the block's maxima where those are larger; its sums are zero.
  RowState<double> raise_anchors(const RowState<double>& near, Block block) {
    stage(block, -INFINITY, -INFINITY);
    const double anchor = scaled(x_.largest_value(block), policy_.k);
    const double ref_anchor =
        alone() ? near.ref_anchor : scaled(y_.largest_value(block), reference_.k);
    return {anchor > near.anchor ? anchor : near.anchor,
            ref_anchor > near.ref_anchor ? ref_anchor : near.ref_anchor,
            {}};
  }

  // A float32 number unless that overflows: the anchor saved for backward is one.
  static double scaled(float logit, double k) {
    const double product = logit * k;
    return is_finite(float(product)) ? float(product) : product;
  }

  static bool is_finite(double value) { return kl_kernels::is_finite(value); }
  static bool is_finite(const RowState<double>& s) {
    return is_finite(s.sums.sx + s.sums.sy + s.sums.ex + s.sums.rk + s.sums.fk);
  }

  const Row& policy_;
  const Row& reference_;
  const bool in_place_;
  Staged x_, y_;
};

RowState<double> fold_row(const Row& policy, const Row& reference, int64_t vocab_size,
                          int64_t token, double* token_tx, double* token_ty) {
  const RowState<double> state = RowFold(policy, reference)(vocab_size, token);
  *token_tx = *token_ty = INFINITY;
  if (token == kNoToken) return state;
  *token_tx = token_from_anchor(policy, token, state.anchor);
  if (reference.logits != nullptr)
    *token_ty = token_from_anchor(reference, token, state.ref_anchor);
  return state;
}

}  // namespace
}  // namespace kl_kernels
