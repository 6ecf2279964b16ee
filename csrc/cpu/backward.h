// One row's gradient: as in fold.h, a fast loop, and a careful one for what it cannot take.
#pragma once

#include "blocks.h"

namespace kl_kernels {
namespace {

// Whose gradient is asked for decides what has to be read and computed.
enum class Terms { policy, kl, both_kls };

// False if anything in the result is not finite: -inf among the logits, or an infinite coefficient.
template <Terms kTerms, class T>
bool backward_fast(const T* x, const T* y, T* grad, int64_t n, float kx, float anchor, float ky,
                   float ref_anchor, const Coefficients<float>& c) {
  Floats check{};
  const auto gradient = [&](Floats xs, Floats ys) __attribute__((always_inline)) {
    const Floats tx = from_anchor(xs, kx, anchor), w = exp2(tx);
    Floats g;
    if constexpr (kTerms == Terms::policy) {
      g = backward(c, tx, w);
    } else {
      const Floats ty = from_anchor(ys, ky, ref_anchor);
      if constexpr (kTerms == Terms::kl)
        g = backward(c, tx, ty, w);
      else
        g = backward(c, tx, ty, w, exp2(ty));
    }
    check += g * 0.0f;
    return g;
  };
  for (int64_t i = 0; i < n; i += kPair) {
    const Pair xs = load_pair(x + i);
    const Pair ys = kTerms == Terms::policy ? xs : load_pair(y + i);
    store_pair(grad + i, {gradient(xs.first, ys.first), gradient(xs.second, ys.second)});
  }
  return is_finite(total(check));
}

// In float64; the floor makes a weight of 0 times its t a 0.
inline void backward_careful(const float* x, const float* y, float* grad, int64_t n, double kx,
                             double anchor, double ky, double ref_anchor,
                             const Coefficients<double>& c) {
  constexpr double kFloor = Limits<double>::kFloor;
  for (int64_t i = 0; i < n; i += kWideLanes) {
    Doubles tx = from_anchor(widen(x + i), kx, anchor);
    Doubles ty = from_anchor(widen(y + i), ky, ref_anchor);
    tx = tx < kFloor ? Doubles{} + kFloor : tx;
    ty = ty < kFloor ? Doubles{} + kFloor : ty;
    store(grad + i, __builtin_convertvector(backward(c, tx, ty, exp2(tx), exp2(ty)), HalfOfFloats));
  }
}

// The derivative of softcap, from its value.
KL_INLINE float softcap_grad(float value, float softcap) {
  const float ratio = value / softcap, derivative = 1 - ratio * ratio;
  return derivative < 0 ? 0 : derivative;
}

class RowBackward {
 public:
  RowBackward(const Row& policy, const Row& reference, double anchor, double ref_anchor,
              const Coefficients<double>& c, void* grad_logits)
      : policy_(policy),
        reference_(reference),
        anchor_(anchor),
        ref_anchor_(ref_anchor),
        c_(c),
        c32_(rounded(c)),
        in_place_(read_in_place(policy, reference)),
        grad_logits_(grad_logits) {}

  void operator()(int64_t vocab_size, int64_t token, double own) {
    bool careful = false;
    for (int64_t start = 0; start < vocab_size; start += kBlock) {
      const Block block{start, vocab_size - start < kBlock ? vocab_size - start : kBlock};
      if (careful || !fast(block)) careful = slow(block);
    }
    // The token's entry once more, in float64: its own share nearly cancels the rest as p nears 1.
    const double tx = floored(token_from_anchor(policy_, token, anchor_));
    const double ty = alone() ? 0 : floored(token_from_anchor(reference_, token, ref_anchor_));
    x_.values[0] = logit_at(policy_, token);
    grad_.values[0] = float(backward(c_, tx, ty, exp2(tx), exp2(ty)) + own);
    write({token, 1});
  }

 private:
  bool alone() const { return reference_.logits == nullptr; }

  static double floored(double t) {
    return t < Limits<double>::kFloor ? Limits<double>::kFloor : t;
  }

  bool fast(Block block) {
    if (in_place_ && block.size % kPair == 0) {
      switch (policy_.dtype) {
        case Dtype::float32:
          return fast_in_place<float>(block);
        case Dtype::bfloat16:
          return fast_in_place<BFloat16>(block);
        case Dtype::float16:
          return fast_in_place<Float16>(block);
      }
    }
    stage(block, far_below(float(anchor_), policy_.k), far_below(float(ref_anchor_), reference_.k));
    if (!fast(x_.values, y_.values, grad_.values, whole_pairs(block.size))) return false;
    write(block);
    return true;
  }

  template <class T>
  bool fast_in_place(Block block) {
    return fast(logits_of<T>(policy_, block.start), logits_of<T>(reference_, block.start),
                static_cast<T*>(grad_logits_) + block.start, block.size);
  }

  template <class T>
  bool fast(const T* x, const T* y, T* grad, int64_t n) {
    const float kx = policy_.k, anchor = float(anchor_);
    const float ky = reference_.k, ref_anchor = float(ref_anchor_);
    if (alone())
      return backward_fast<Terms::policy>(x, y, grad, n, kx, anchor, ky, ref_anchor, c32_);
    if (c_.d == 0) return backward_fast<Terms::kl>(x, y, grad, n, kx, anchor, ky, ref_anchor, c32_);
    return backward_fast<Terms::both_kls>(x, y, grad, n, kx, anchor, ky, ref_anchor, c32_);
  }

  // True if there was -inf in the block, so that the next one had better come here at once.
  bool slow(Block block) {
    stage(block, -INFINITY, -INFINITY);
    const Staged& y = alone() ? x_ : y_;
    backward_careful(x_.values, y.values, grad_.values, whole_pairs(block.size), policy_.k, anchor_,
                     alone() ? policy_.k : reference_.k, alone() ? anchor_ : ref_anchor_, c_);
    write(block);
    return x_.holds_minus_infinity(block) || y.holds_minus_infinity(block);
  }

  void stage(Block block, float padding, float ref_padding) {
    x_.stage(policy_, block, padding);
    if (!alone()) y_.stage(reference_, block, ref_padding);
  }

  // The staged gradient, through the softcap, in the dtype of the logits.
  void write(Block block) {
    if (policy_.softcap != 0) {
      for (int64_t i = 0; i < block.size; ++i)
        grad_.values[i] *= softcap_grad(x_.values[i], policy_.softcap);
    }
    if (policy_.dtype == Dtype::float32) write_as<float>(block);
    if (policy_.dtype == Dtype::bfloat16) write_as<BFloat16>(block);
    if (policy_.dtype == Dtype::float16) write_as<Float16>(block);
  }

  template <class T>
  void write_as(Block block) {
    T* to = static_cast<T*>(grad_logits_) + block.start;
    for (int64_t i = 0; i < block.size; ++i) from_float(grad_.values[i], to[i]);
  }

  const Row& policy_;
  const Row& reference_;
  const double anchor_, ref_anchor_;
  const Coefficients<double> c_;
  const Coefficients<float> c32_;
  const bool in_place_;
  void* const grad_logits_;
  Staged x_, y_, grad_;
};

void backward_row(const Row& policy, const Row& reference, int64_t vocab_size, int64_t token,
                  double anchor, double ref_anchor, const Coefficients<double>& c, double own,
                  void* grad_logits) {
  RowBackward(policy, reference, anchor, ref_anchor, c, grad_logits)(vocab_size, token, own);
}

}  // namespace
}  // namespace kl_kernels
