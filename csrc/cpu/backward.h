// One row's gradient: as in fold.h, fast loops, and one in float64 for what they cannot take.
#pragma once

#include "blocks.h"

namespace kl_kernels {
namespace {

// Whose gradient is asked for decides what must be read and computed.
enum class Terms { policy, kl, both_kls };

// Returns the sum of what it writes. That is not finite if anything in it is not: an infinite
// coefficient or, unguarded, -inf among the logits.
template <Terms kTerms, bool kGuarded, class T>
double backward_fast(const T* x, const T* y, T* grad, int64_t n, int64_t ahead, float kx,
                     float anchor, float ky, float ref_anchor,
                     const Coefficients<float>& coefficients) {
  const Coefficients<float> c = coefficients;  // which stores to `grad` cannot change
  Floats sum{};
  const auto gradient = [&](Floats xs, Floats ys) __attribute__((always_inline)) {
    const Floats tx = position<kGuarded>(xs, kx, anchor), w = exp2(tx);
    Floats g;
    if constexpr (kTerms == Terms::policy) {
      g = backward(c, tx, w);
    } else {
      const Floats ty = position<kGuarded>(ys, ky, ref_anchor);
      if constexpr (kTerms == Terms::kl)
        g = backward(c, tx, ty, w);
      else
        g = backward(c, tx, ty, w, exp2(ty));
    }
    sum += g;
    return g;
  };
  for (int64_t i = 0; i < n; i += kPair) {
    const Pair xs = load_pair(x + i, ahead);
    const Pair ys = kTerms == Terms::policy ? xs : load_pair(y + i, ahead);
    store_pair(grad + i, {gradient(xs.first, ys.first), gradient(xs.second, ys.second)});
  }
  return total(sum);
}

// The same in float64; the floor makes a weight of 0 times its t a 0.
inline double backward_float64(const float* x, const float* y, float* grad, int64_t n, double kx,
                               double anchor, double ky, double ref_anchor,
                               const Coefficients<double>& c) {
  constexpr double kFloor = Limits<double>::kFloor;
  Doubles sum{};
  for (int64_t i = 0; i < n; i += kWideLanes) {
    Doubles tx = from_anchor(widen(x + i), kx, anchor);
    Doubles ty = from_anchor(widen(y + i), ky, ref_anchor);
    tx = tx < kFloor ? Doubles{} + kFloor : tx;
    ty = ty < kFloor ? Doubles{} + kFloor : ty;
    const Doubles g = backward(c, tx, ty, exp2(tx), exp2(ty));
    sum += g;
    store(grad + i, __builtin_convertvector(g, HalfOfFloats));
  }
  return total(sum);
}

class RowBackward {
 public:
  RowBackward(const Row& policy, const Row& reference, int64_t vocab_size,
              const RowGradient& gradient, void* grad_logits)
      : policy_(policy),
        reference_(reference),
        vocab_size_(vocab_size),
        anchor_(gradient.anchor),
        ref_anchor_(gradient.ref_anchor),
        in_float64_(gradient.in_float64),
        in_place_(read_in_place(policy, reference)),
        grad_logits_(grad_logits) {
    set_coefficients(gradient.c);
  }

  void operator()(int64_t token, const RowGradient& gradient) {
    const double excess = write_all() + gradient.own;
    // Adding a constant to the logits changes nothing, so a gradient sums to 0. What it sums to
    // instead is the rounding of the saved kl, and where one token has nearly all the probability
    // that may be all there is of its gradient.
    if (excess > gradient.tolerance || excess < -gradient.tolerance) {
      Coefficients<double> corrected = c_;
      corrected.a -= excess / gradient.sx;
      set_coefficients(corrected);
      write_all();
    }
    if (token == kNoToken) return;
    // The token's entry once more, in float64: its own share nearly cancels the rest as p nears 1.
    const double tx = floored(token_from_anchor(policy_, token, anchor_));
    const double ty = has_ref() ? floored(token_from_anchor(reference_, token, ref_anchor_)) : 0;
    x_.values[0] = logit_at(policy_, token);
    grad_.values[0] = float(backward(c_, tx, ty, exp2(tx), exp2(ty)) + gradient.own);
    write({token, 1});
  }

 private:
  bool has_ref() const { return reference_.logits != nullptr; }

  void set_coefficients(const Coefficients<double>& c) {
    c_ = c;
    c32_ = {float(c.a), float(c.b), float(c.c), float(c.d)};
  }

  static double floored(double t) {
    return t < Limits<double>::kFloor ? Limits<double>::kFloor : t;
  }

  // All but the token's own share; returns the sum.
  double write_all() {
    double sum = 0;
    bool guarded = false;  // from the first -inf on
    for (int64_t start = 0; start < vocab_size_; start += kBlock) {
      const Block block = block_at(start, vocab_size_);
      double part = in_float64_ || guarded ? NAN : fast<false>(block);
      if (!in_float64_ && !is_finite(part)) guarded = is_finite(part = fast<true>(block));
      if (!is_finite(part)) part = in_float64(block);
      sum += part;
    }
    return sum;
  }

  template <bool kGuarded>
  double fast(Block block) {
    if (in_place_ && block.size % kPair == 0) {
      switch (policy_.dtype) {
        case Dtype::float32:
          return fast_in_place<kGuarded, float>(block);
        case Dtype::bfloat16:
          return fast_in_place<kGuarded, BFloat16>(block);
        case Dtype::float16:
          return fast_in_place<kGuarded, Float16>(block);
      }
    }
    stage(block, far_below(float(anchor_), policy_.k), far_below(float(ref_anchor_), reference_.k));
    const double sum =
        fast<kGuarded>(x_.values, y_.values, grad_.values, whole_pairs(block.size), kStagedAhead);
    if (is_finite(sum)) write(block);
    return sum;
  }

  template <bool kGuarded, class T>
  double fast_in_place(Block block) {
    return fast<kGuarded>(logits_of<T>(policy_, block.start), logits_of<T>(reference_, block.start),
                          static_cast<T*>(grad_logits_) + block.start, block.size,
                          bytes_ahead<T>(block, vocab_size_));
  }

  template <bool kGuarded, class T>
  double fast(const T* x, const T* y, T* grad, int64_t n, int64_t ahead) {
    const float kx = policy_.k, anchor = float(anchor_);
    const float ky = reference_.k, ref_anchor = float(ref_anchor_);
    if (!has_ref())
      return backward_fast<Terms::policy, kGuarded>(x, y, grad, n, ahead, kx, anchor, ky,
                                                    ref_anchor, c32_);
    if (c_.d == 0)
      return backward_fast<Terms::kl, kGuarded>(x, y, grad, n, ahead, kx, anchor, ky, ref_anchor,
                                                c32_);
    return backward_fast<Terms::both_kls, kGuarded>(x, y, grad, n, ahead, kx, anchor, ky,
                                                    ref_anchor, c32_);
  }

  double in_float64(Block block) {
    stage(block, -INFINITY, -INFINITY);
    const Staged& y = has_ref() ? y_ : x_;
    const double sum = backward_float64(x_.values, y.values, grad_.values, whole_pairs(block.size),
                                        policy_.k, anchor_, has_ref() ? reference_.k : policy_.k,
                                        has_ref() ? ref_anchor_ : anchor_, c_);
    write(block);
    return sum;
  }

  void stage(Block block, float padding, float ref_padding) {
    x_.stage(policy_, block, padding);
    if (has_ref()) y_.stage(reference_, block, ref_padding);
  }

  void write(Block block) { write_gradient(policy_, x_, grad_, block, grad_logits_); }

  const Row& policy_;
  const Row& reference_;
  const int64_t vocab_size_;
  const double anchor_, ref_anchor_;
  Coefficients<double> c_;
  Coefficients<float> c32_;
  const bool in_float64_;
  const bool in_place_;
  void* const grad_logits_;
  Staged x_, y_, grad_;
};

void backward_row(const Row& policy, const Row& reference, int64_t vocab_size, int64_t token,
                  const RowGradient& gradient, void* grad_logits) {
  RowBackward(policy, reference, vocab_size, gradient, grad_logits)(token, gradient);
}

}  // namespace
}  // namespace kl_kernels
