// One row's state: fast loops around fixed anchors, and one with a running maximum for whatever
// defeats them.
#pragma once

#include "blocks.h"

namespace kl_kernels {
namespace {

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

// The loops over a block's logits, each slower than the one before and taking what defeats that.
enum class Loop { near, plain, guarded, running_max };

// Sums of a block, and whether one model rules out what the other does not: then a KL is infinite.
struct BlockSums {
  Sums<double> sums;
  bool are_right = true;  // as far as the loop can tell
  bool kl_is_infinite = false, forward_kl_is_infinite = false;

  KL_INLINE void compare_support(Ints only_reference, Ints only_policy) {
    for (int i = 0; i < kLanes; ++i) {
      kl_is_infinite |= only_reference[i] != 0;
      forward_kl_is_infinite |= only_policy[i] != 0;
    }
  }
};

// From sums of weights that were rounded apart, ln(sum w / sum u) is off by 1e-7, which is 1 % of a
// KL of 1e-5. Within half a bit, u - w is w (2^gap - 1), gap = ty - tx, however small it is.
constexpr float kNear = 0.5f;
KL_INLINE Floats excess_of_near(Floats w, Floats gap) { return w * (exp2m1_over(gap) * gap); }

// The loop for blocks of such pairs alone. sum u is sum w plus what they differ by.
template <class T>
BlockSums fold_near(const T* x, const T* y, int64_t n, int64_t ahead, float kx, float anchor,
                    float ky, float ref_anchor) {
  CompensatedSum sx;
  Sums<Floats> s{};  // but for sx; sy is sum u - w
  Floats widest{};
  const auto fold = [&](Floats xs, Floats ys) __attribute__((always_inline)) {
    const Weighed of_x = weigh<false>(xs, kx, anchor);
    const Floats ty = position<false>(ys, ky, ref_anchor), gap = ty - of_x.t;
    const Floats excess = excess_of_near(of_x.weight, gap);
    s.sy += excess;
    fold_moments(s, of_x.t, ty, of_x.weight, of_x.weight + excess);
    widest = largest(magnitude(gap), widest);
    return of_x.weight;
  };
  // Rows of models that differ show it at once, and have lost little then.
  constexpr int64_t kProbe = 8 * kPair;
  for (int64_t begin = 0, end = n < kProbe ? n : kProbe; begin < n; begin = end, end = n) {
    for (int64_t i = begin; i < end; i += kPair) {
      const Pair xs = load_pair(x + i, ahead), ys = load_pair(y + i, ahead);
      const Floats first = fold(xs.first, ys.first), second = fold(xs.second, ys.second);
      sx.add(first + second);
    }
    for (int i = 0; i < kLanes; ++i)
      if (!(widest[i] <= kNear)) return {{}, false};
  }
  const double sum = sx.total();
  return {{sum, sum + total(s.sy), total(s.ex), total(s.rk), total(s.fk)}};
}

// sum u - sum w of any pairs, whose weights do not overflow.
inline double excess(const float* x, const float* y, int64_t n, float kx, float anchor, float ky,
                     float ref_anchor) {
  Floats sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    const Weighed of_x = weigh<true>(load<Floats>(x + i), kx, anchor),
                  of_y = weigh<true>(load<Floats>(y + i), ky, ref_anchor);
    const Floats gap = of_y.t - of_x.t;
    sum += magnitude(gap) <= kNear ? excess_of_near(of_x.weight, gap) : of_y.weight - of_x.weight;
  }
  return total(sum);
}

// The loop for any pairs: no maximum, no rescaling, no test. Anything out of the ordinary (NaN, a
// peak far above the anchor and, unguarded, -inf) shows in the sums.
template <bool kGuarded, class T>
BlockSums fold_fast(const T* x, const T* y, int64_t n, int64_t ahead, float kx, float anchor,
                    float ky, float ref_anchor) {
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
    const Pair xs = load_pair(x + i, ahead), ys = load_pair(y + i, ahead);
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
BlockSums fold_fast(const T* x, int64_t n, int64_t ahead, float kx, float anchor) {
  CompensatedSum sx;
  Sums<Floats> s{};
  for (int64_t i = 0; i < n; i += kPair) {
    const Pair xs = load_pair(x + i, ahead);
    const Weighed x1 = weigh<kGuarded>(xs.first, kx, anchor);
    const Weighed x2 = weigh<kGuarded>(xs.second, kx, anchor);
    fold_moments(s, x1.t, x1.weight);
    fold_moments(s, x2.t, x2.weight);
    sx.add(x1.weight + x2.weight);
  }
  return {{sx.total(), 0, total(s.ex), 0, 0}};
}

// In float64, with the block's own maxima as anchors and -inf handled by support.
inline Sums<double> fold_running_max(const float* x, const float* y, int64_t n, double kx,
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
  RowFold(const Row& policy, const Row& reference, int64_t vocab_size)
      : policy_(policy),
        reference_(reference),
        vocab_size_(vocab_size),
        in_place_(read_in_place(policy, reference)) {}

  RowState<double> operator()(int64_t token) {
    // The sampled token is nearly always close to the top, wherever that is.
    RowState<double> state = empty_state<double>();
    if (token != kNoToken) state = raise_anchors(state, {token, 1});
    state = raise_anchors(state, block_at(0, vocab_size_));
    Loop loop = has_ref() ? Loop::near : Loop::plain;  // the rest of a row is like its beginning
    bool all_near = true;
    for (int64_t start = 0; start < vocab_size_; start += kBlock) {
      const Block block = block_at(start, vocab_size_);
      RowState<double> part = state;
      const Loop used = fold_block(block, part, loop);
      if (used != Loop::running_max) loop = used;
      all_near &= used == Loop::near;
      state = merge(state, part);
    }
    if (!has_ref() || all_near || !are_floats(state) || !is_small(state)) return state;
    // Seldom: one model hardly differs from the other, but for tokens that neither will choose.
    double excess = 0;
    for (int64_t start = 0; start < vocab_size_; start += kBlock)
      excess += excess_of(block_at(start, vocab_size_), state);
    state.sums.sy = state.sums.sx + excess;
    return state;
  }

 private:
  bool has_ref() const { return reference_.logits != nullptr; }

  // Sums of the block into `part`, around its anchors or higher ones, by `loop` or one behind it.
  Loop fold_block(Block block, RowState<double>& part, Loop loop) {
    const RowState<double> anchors = part;
    if (loop == Loop::near && fast<Loop::near>(block, part)) return loop;
    if (loop <= Loop::plain && fast<Loop::plain>(block, part = anchors)) return Loop::plain;
    if (fast<Loop::guarded>(block, part = anchors)) return Loop::guarded;
    in_running_max(block, part = anchors);
    return Loop::running_max;
  }

  // Whether float arithmetic can take these anchors.
  bool are_floats(const RowState<double>& anchors) const {
    const auto is_float = [](double anchor) { return float(anchor) == anchor; };
    return is_float(anchors.anchor) && (!has_ref() || is_float(anchors.ref_anchor));
  }

  // False if the loop will not do.
  template <Loop kLoop>
  bool fast(Block block, RowState<double>& part) {
    BlockSums found = fast_sums<kLoop>(block, part);
    part.sums = found.sums;
    if (!found.are_right || !is_finite(part)) return false;
    // Many or large weights. What matters is that none of them lies far above its anchor: t has
    // an absolute error of 2^-24 t, and so has the KL.
    constexpr double kCrowded = kBlock / 8;
    if (part.sums.sx > kCrowded || part.sums.sy > kCrowded) {
      const RowState<double> raised = raise_anchors(part, block);
      if (raised.anchor > part.anchor || raised.ref_anchor > part.ref_anchor) {
        part = raised;
        found = fast_sums<kLoop>(block, part);
        part.sums = found.sums;
      }
      if (!found.are_right || !is_finite(part)) return false;
    }
    if (found.kl_is_infinite) part.sums.rk = INFINITY;
    if (found.forward_kl_is_infinite) part.sums.fk = INFINITY;
    return true;
  }

  // Whether rounding shows in a KL: it is 1e-7.
  static bool is_small(const RowState<double>& state) {
    constexpr double kSmall = 1e-4;
    const Finished<double> found = finish(state.sums, 0.0, 0.0);
    return found.kl < kSmall || found.forward_kl < kSmall;
  }

  double excess_of(Block block, const RowState<double>& state) {
    const float anchor = float(state.anchor), ref_anchor = float(state.ref_anchor);
    stage(block, far_below(anchor, policy_.k), far_below(ref_anchor, reference_.k));
    return excess(x_.values, y_.values, whole_pairs(block.size), policy_.k, anchor, reference_.k,
                  ref_anchor);
  }

  void in_running_max(Block block, RowState<double>& part) {
    part = raise_anchors(part, block);  // stages the block, too
    const Staged& y = has_ref() ? y_ : x_;
    part.sums = fold_running_max(x_.values, y.values, whole_pairs(block.size), policy_.k,
                                 part.anchor, has_ref() ? reference_.k : policy_.k,
                                 has_ref() ? part.ref_anchor : part.anchor);
  }

  template <Loop kLoop>
  BlockSums fast_sums(Block block, const RowState<double>& anchors) {
    if (!are_floats(anchors)) return {{}, false};
    const float anchor = float(anchors.anchor), ref_anchor = float(anchors.ref_anchor);
    if (in_place_ && block.size % kPair == 0) {
      switch (policy_.dtype) {
        case Dtype::float32:
          return fast_sums<kLoop, float>(block, anchor, ref_anchor);
        case Dtype::bfloat16:
          return fast_sums<kLoop, BFloat16>(block, anchor, ref_anchor);
        case Dtype::float16:
          return fast_sums<kLoop, Float16>(block, anchor, ref_anchor);
      }
    }
    stage(block, far_below(anchor, policy_.k), far_below(ref_anchor, reference_.k));
    return fast_sums<kLoop>(x_.values, y_.values, whole_pairs(block.size), kStagedAhead, anchor,
                            ref_anchor);
  }

  template <Loop kLoop, class T>
  BlockSums fast_sums(Block block, float anchor, float ref_anchor) {
    return fast_sums<kLoop>(logits_of<T>(policy_, block.start),
                            logits_of<T>(reference_, block.start), block.size,
                            bytes_ahead<T>(block, vocab_size_), anchor, ref_anchor);
  }

  template <Loop kLoop, class T>
  BlockSums fast_sums(const T* x, const T* y, int64_t n, int64_t ahead, float anchor,
                      float ref_anchor) {
    constexpr bool kGuarded = kLoop == Loop::guarded;
    if constexpr (kLoop == Loop::near)
      return fold_near(x, y, n, ahead, policy_.k, anchor, reference_.k, ref_anchor);
    return has_ref()
               ? fold_fast<kGuarded>(x, y, n, ahead, policy_.k, anchor, reference_.k, ref_anchor)
               : fold_fast<kGuarded>(x, n, ahead, policy_.k, anchor);
  }

  void stage(Block block, float padding, float ref_padding) {
    x_.stage(policy_, block, padding);
    if (has_ref()) y_.stage(reference_, block, ref_padding);
  }

  // The same anchors, or the block's maxima where those are larger; its sums are zero.
  RowState<double> raise_anchors(const RowState<double>& near, Block block) {
    stage(block, -INFINITY, -INFINITY);
    const double anchor = scaled(x_.largest_value(block), policy_.k);
    const double ref_anchor =
        has_ref() ? scaled(y_.largest_value(block), reference_.k) : near.ref_anchor;
    return {anchor > near.anchor ? anchor : near.anchor,
            ref_anchor > near.ref_anchor ? ref_anchor : near.ref_anchor,
            {}};
  }

  // A float, as the anchor saved for backward is, unless that says too little: the product is
  // exact.
  static double scaled(float logit, double k) {
    const double product = logit * k;
    return is_far(product) ? product : float(product);
  }

  static bool is_finite(double value) { return kl_kernels::is_finite(value); }
  static bool is_finite(const RowState<double>& s) {
    return is_finite(s.sums.sx + s.sums.sy + s.sums.ex + s.sums.rk + s.sums.fk);
  }

  const Row& policy_;
  const Row& reference_;
  const int64_t vocab_size_;
  const bool in_place_;
  Staged x_, y_;
};

RowState<double> fold_row(const Row& policy, const Row& reference, int64_t vocab_size,
                          int64_t token, double* token_tx, double* token_ty) {
  const RowState<double> state = RowFold(policy, reference, vocab_size)(token);
  *token_tx = *token_ty = INFINITY;
  if (token == kNoToken) return state;
  *token_tx = token_from_anchor(policy, token, state.anchor);
  if (reference.logits != nullptr)
    *token_ty = token_from_anchor(reference, token, state.ref_anchor);
  return state;
}

}  // namespace
}  // namespace kl_kernels
