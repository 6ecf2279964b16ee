// A policy p and a reference q beside their mixture m = (1 - beta) p + beta q, once for host and
// device, scalars and vectors of lanes. kl_kernels/algebra/row.py says the same in PyTorch (`mix`).
//
// The larger of the two is the one to divide by. With s = 2^-fall <= 1 the ratio of the smaller to
// the larger, and c the smaller one's weight in the mixture,
//
//     log2(m / larger) = log2(1 + c (s - 1))     log2(m / smaller) = that + fall
//
// so nothing overflows, nothing cancels where p is near q, and equal logits give exactly 0.
#pragma once

#include <stdint.h>
#include <string.h>

#include "row_math.h"

namespace kl_kernels {

// A row's constants of the mixture, besides tx and ty.
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

// log2(1 + z) / z for 1 + z between the roots of 1/2 and 2, within 2.7e-8: minimax in relative
// error among the polynomials of degree 8.
template <class Real>
KL_HOST_DEVICE Real log2_over_z(Real z) {
  Real q = z * 0.12583696842f - 0.20726978779f;
  q = q * z + 0.21571564674f;
  q = q * z - 0.23894481361f;
  q = q * z + 0.28791624308f;
  q = q * z - 0.36070367694f;
  q = q * z + 0.48091062903f;
  q = q * z - 0.72134733200f;
  return q * z + 1.44269502163f;
}
constexpr int32_t kRootOfHalf = 0x3f3504f3, kExponent = -(1 << 23);  // the bits of a float

template <class Real>
struct Power {
  Real power, less_one;
};

// all(x) is x in every lane; exp2(t), for t <= 0, is 2^t and 2^t - 1; log2p1(u) is log2(1 + u) for
// -1 < u <= 0.
struct ScalarFunctions {
  KL_HOST_DEVICE static float all(float x) { return x; }  // not 0 + x, which costs an addition
  KL_HOST_DEVICE static float magnitude(float x) { return fabsf(x); }
  KL_HOST_DEVICE static Power<float> exp2(float t) {
    const float power = exp2f(t);
    return {power, power - 1};
  }
  // In half of log2f's instructions: 1 + u = 2^k (1 + z).
  KL_HOST_DEVICE static float log2p1(float u) {
    const float v = 1 + u;
    int32_t bits;
    memcpy(&bits, &v, sizeof bits);
    const int32_t exponent = (bits - kRootOfHalf) & kExponent;
    bits -= exponent;
    float m;
    memcpy(&m, &bits, sizeof m);
    const float z = m - 1;
    return z * log2_over_z(z) + static_cast<float>(exponent) * 0x1p-23f;
  }
};

template <class Real>
struct Beside {
  Real policy;  // log2(m / p)
  Real jsd;     // (1 - beta) p log2(m / p) + beta q log2(m / q), over the larger of p and q
  Real p;       // over the larger
  Real larger;  // log2, plus log2 sx
};

// -inf of both is a fall of NaN and becomes kMostFall; its weight 2^-inf is 0 all the same.
// (AVX-512's scalef turns a NaN exponent into 2^-inf = 0 here.)
template <class Functions, class Real, class Scalar>
KL_HOST_DEVICE Beside<Real> beside_mixture(const Mixture<Scalar>& mixture, Real tx, Real ty) {
  constexpr Scalar kMostFall = 100;
  const Real zero{}, moved = ty + mixture.shift, gap = moved - tx;
  const auto q_is_larger = gap > zero;
  const Real larger = q_is_larger ? moved : tx;
  Real minus_fall = -Functions::magnitude(gap);
  minus_fall = minus_fall > -kMostFall ? minus_fall : zero - kMostFall;
  const auto [s, lost] = Functions::exp2(minus_fall);
  const Real c = q_is_larger ? Functions::all(mixture.weight) : Functions::all(mixture.ref_weight);
  const Real u = c * lost, of_larger = Functions::log2p1(u);
  return {of_larger - (q_is_larger ? minus_fall : zero),
          (u + Scalar(1)) * of_larger - c * s * minus_fall, q_is_larger ? s : zero + Scalar(1),
          larger};
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
