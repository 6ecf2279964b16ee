// A policy p and a reference q beside their mixture m = (1 - beta) p + beta q, once for host and
// device, scalars and vectors of lanes. kl_kernels/algebra.py says the same in PyTorch (`mix`).
//
// The larger of the two is the one to divide by. With s = 2^-fall <= 1 the ratio of the smaller to
// the larger, and c the smaller one's weight in the mixture,
//
//     log2(m / larger) = log2(1 + c (s - 1))     log2(m / smaller) = that + fall
//
// so nothing overflows, nothing cancels where p is near q, and equal logits give exactly 0.
#pragma once

#include "kl_math.h"

namespace kl_kernels {

// What a logit's place in the mixture depends on besides tx and ty.
template <class Real>
struct Mixture {
  Real shift;  // log2(sx / sy): ty + shift is log2 q where tx is log2 p; NaN if the row is
  Real weight, ref_weight;  // 1 - beta and beta, both below 1
};

template <class Real>
KL_HOST_DEVICE Mixture<Real> mixture_of(double sx, double sy, double beta) {
  constexpr double kMost = 1 - 0x1p-24;  // 1 + c (s - 1) is to stay above 0
  const double weight = 1 - beta < kMost ? 1 - beta : kMost,
               ref_weight = beta < kMost ? beta : kMost;
  const double shift = log2(sx) - log2(sy);
  return {Real(shift + (shift - shift)), Real(weight), Real(ref_weight)};
}

// exp2m1(t) = 2^t - 1 for t <= 0, and log2p1(u) = log2(1 + u) for -1 < u <= 0.
struct ScalarFunctions {
  KL_HOST_DEVICE static float exp2m1(float t) { return exp2f(t) - 1; }
  KL_HOST_DEVICE static float log2p1(float u) { return log2f(1 + u); }
};

template <class Real>
struct Beside {
  Real policy;  // log2(m / p)
  Real jsd;     // (1 - beta) p log2(m / p) + beta q log2(m / q), over the larger of p and q
  Real p;       // over the larger
  Real larger;  // log2, plus log2 sx
};

// -inf of both is a fall of NaN and becomes kMostFall; its weight is 0 all the same.
template <class Functions, class Real, class Scalar>
KL_HOST_DEVICE Beside<Real> beside_mixture(const Mixture<Scalar>& mixture, Real tx, Real ty) {
  constexpr Scalar kMostFall = 100, kLowest = -1000;
  const Real zero{}, moved = ty + mixture.shift;
  const auto q_is_larger = moved > tx;
  const Real larger = q_is_larger ? moved : tx;
  Real fall = q_is_larger ? moved - tx : tx - moved;
  fall = fall < kMostFall ? fall : zero + kMostFall;
  const Real lost = Functions::exp2m1(-fall), s = lost + Scalar(1);
  const Real c = q_is_larger ? zero + mixture.weight : zero + mixture.ref_weight;
  const Real u = c * lost, of_larger = Functions::log2p1(u);
  return {of_larger + (q_is_larger ? fall : zero), (u + Scalar(1)) * of_larger + c * s * fall,
          q_is_larger ? s : zero + Scalar(1), larger < kLowest ? zero + kLowest : larger};
}

// The sums over the vocabulary, in nats.
template <class Real>
struct MixtureSums {
  Real jsd;
  Real kl;  // KL(p || m)
};

// From sums of 2^larger times jsd and p log2(m / p). NaN where the row is.
KL_HOST_DEVICE MixtureSums<double> finish_mixture(double jsd, double kl, double sx, double shift) {
  const double scale = -kLn2 / sx, nan_of_row = shift - shift;
  return {scale * jsd + nan_of_row, scale * kl + nan_of_row};
}

// A logit's gradient is 2^tx (a + b log2(m / p)): of jsd it is (1 - beta) p (log(p / m) - kl).
template <class Real>
struct MixtureSlope {
  Real a, b;
};
KL_HOST_DEVICE MixtureSlope<double> mixture_slope(double grad_jsd, double kl, double sx,
                                                  double beta, double temperature) {
  const double scale = -grad_jsd * (1 - beta) / (temperature * sx);
  return {scale * kl, scale * kLn2};
}

}  // namespace kl_kernels
