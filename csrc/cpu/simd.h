// Vectors of lanes for whatever instruction set this file is compiled for: loads and stores of
// float, bfloat16 and float16, 2^t and tanh. Written with the compiler's portable vector types;
// intrinsics only where one instruction replaces several.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../common/mixture.h"
#include "../common/row_math.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define KL_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KL_VECTOR_BYTES 32
#else
#define KL_VECTOR_BYTES 16
#endif
#define KL_VECTOR __attribute__((vector_size(KL_VECTOR_BYTES)))
#define KL_INLINE [[gnu::always_inline]] inline

namespace kl_kernels {
// Nothing here may be shared between object files of different instruction sets.
namespace {

constexpr int kLanes = KL_VECTOR_BYTES / 4;
constexpr int kWideLanes = KL_VECTOR_BYTES / 8;

typedef float Floats KL_VECTOR;
typedef int32_t Ints KL_VECTOR;
typedef uint32_t Words KL_VECTOR;
typedef double Doubles KL_VECTOR;
typedef uint64_t DoubleWords KL_VECTOR;
typedef float HalfOfFloats __attribute__((vector_size(KL_VECTOR_BYTES / 2)));
typedef double TwiceDoubles __attribute__((vector_size(KL_VECTOR_BYTES * 2)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// memcpy is the portable unaligned load: rows of an odd vocabulary start anywhere.
template <class Vector>
KL_INLINE Vector load(const void* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class Vector>
KL_INLINE void store(void* to, Vector v) {
  memcpy(to, &v, sizeof v);
}

KL_INLINE Doubles widen(const float* from) {
  return __builtin_convertvector(load<HalfOfFloats>(from), Doubles);
}

using ::exp2;
using kl_kernels::from_anchor;

// A vector overload of the algebra's one anchored expression; the compiler fuses it where the
// machine can. Where it cannot, the product is formed in float64, in which it is exact.
KL_INLINE Floats from_anchor(Floats x, float k, float anchor) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return x * k - anchor;
#else
  return __builtin_convertvector(
      __builtin_convertvector(x, TwiceDoubles) * double(k) - double(anchor), Floats);
#endif
}
KL_INLINE Doubles from_anchor(Doubles x, double k, double anchor) { return x * k - anchor; }

// Scalars.

KL_INLINE float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
KL_INLINE uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KL_INLINE float to_float(float value) { return value; }
KL_INLINE float to_float(BFloat16 value) { return float_of_bits(uint32_t(value.bits) << 16); }
// The exponent is moved by a multiplication, which also normalises subnormal numbers.
KL_INLINE float to_float(Float16 value) {
  const uint32_t magnitude = uint32_t(value.bits & 0x7fff) << 13;
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t rebased = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
  return float_of_bits(sign | (magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : rebased));
}

// Round to nearest even; NaN stays NaN.
KL_INLINE void from_float(float value, float& to) { to = value; }
KL_INLINE void from_float(float value, BFloat16& to) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(value != value ? (bits >> 16) | 0x40 : rounded);
}
KL_INLINE void from_float(float value, Float16& to) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Adding 1/2 leaves a subnormal result's bits at the bottom of the sum, rounded by the adder.
  const uint32_t subnormal = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t infinite_or_nan = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  to.bits = uint16_t((bits >> 16 & 0x8000) | (magnitude >= 0x477ff000 ? infinite_or_nan : finite));
}

// Two vectors at a time, so that 16-bit logits fill whole loads. A pair's order of lanes is its
// own; load_pair and store_pair of one type agree on it.

struct Pair {
  Floats first, second;
};
constexpr int kPair = 2 * kLanes;

KL_INLINE Pair load_pair(const float* from) {
  return {load<Floats>(from), load<Floats>(from + kLanes)};
}
KL_INLINE void store_pair(float* to, Pair v) {
  store(to, v.first);
  store(to + kLanes, v.second);
}

// Even and odd logits: one shift and one mask, no shuffle (little-endian machines only, as torch).
KL_INLINE Pair load_pair(const BFloat16* from) {
  const Words words = load<Words>(from);
  return {Floats(words << 16), Floats(words & 0xffff0000u)};
}
KL_INLINE Words round_to_bfloat16(Floats v) {  // finite v; the result is in the upper halves
  const Words bits = Words(v);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}
KL_INLINE void store_pair(BFloat16* to, Pair v) {
  store(to, (round_to_bfloat16(v.first) >> 16) | (round_to_bfloat16(v.second) & 0xffff0000u));
}

#if defined(__AVX512F__)
KL_INLINE Pair load_pair(const Float16* from) {
  const __m512i halves = load<__m512i>(from);
  return {Floats(_mm512_cvtph_ps(_mm512_castsi512_si256(halves))),
          Floats(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)))};
}
KL_INLINE void store_pair(Float16* to, Pair v) {
  store(to, _mm512_cvtps_ph(v.first, _MM_FROUND_TO_NEAREST_INT));
  store(to + kLanes, _mm512_cvtps_ph(v.second, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
KL_INLINE Pair load_pair(const Float16* from) {
  return {Floats(_mm256_cvtph_ps(load<__m128i>(from))),
          Floats(_mm256_cvtph_ps(load<__m128i>(from + kLanes)))};
}
KL_INLINE void store_pair(Float16* to, Pair v) {
  store(to, _mm256_cvtps_ph(v.first, _MM_FROUND_TO_NEAREST_INT));
  store(to + kLanes, _mm256_cvtps_ph(v.second, _MM_FROUND_TO_NEAREST_INT));
}
#else
KL_INLINE Pair load_pair(const Float16* from) {
  float values[kPair];
  for (int i = 0; i < kPair; ++i) values[i] = to_float(from[i]);
  return load_pair(values);
}
KL_INLINE void store_pair(Float16* to, Pair v) {
  float values[kPair];
  store_pair(values, v);
  for (int i = 0; i < kPair; ++i) from_float(values[i], to[i]);
}
#endif

// (2^f - 1) / f for |f| <= 1/2, within 7e-7 and far closer around 0, where it is ln 2.
KL_INLINE Floats exp2m1_over(Floats f) {
  Floats q = f * 1.330026425e-3f + 9.669708088e-3f;
  q = q * f + 5.550559983e-2f;
  q = q * f + 0.2402228117f;
  return q * f + float(kLn2);
}

// 2^f for |f| <= 1/2, within 1.1e-7 and far closer around 0, where the largest weights are: minimax
// in relative error among the polynomials of degree 5 that begin with 1 + f ln 2.
KL_INLINE Floats exp2_around_zero(Floats f) { return exp2m1_over(f) * f + 1.0f; }

constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits

#if defined(__AVX512F__)
KL_INLINE Floats exp2(Floats t) {
  const Floats nearest = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(exp2_around_zero(t - nearest), nearest);
}
#else
// Above 127 the result stays 2^127: enough to be noticed, and the exponent must not wrap.
KL_INLINE Floats exp2(Floats t) {
  const Floats capped = t < 127.0f ? t : Floats{} + 127.0f;
  const Floats shifted = capped + kRound;
  const Floats scaled =
      Floats(Words(exp2_around_zero(capped - (shifted - kRound))) + (Words(shifted) << 23));
  return t < -126.0f ? Floats{} : scaled;
}
#endif

// 2^f for |f| <= 1/2, within 1e-14: its series, the next term of which is (f ln 2)^12 / 12!.
KL_INLINE Doubles exp2_around_zero(Doubles f) {
  constexpr double kFactors[] = {kLn2 / 11, kLn2 / 10, kLn2 / 9, kLn2 / 8, kLn2 / 7, kLn2 / 6,
                                 kLn2 / 5,  kLn2 / 4,  kLn2 / 3, kLn2 / 2, kLn2};
  Doubles q = Doubles{} + 1;
  for (const double factor : kFactors) q = q * (f * factor) + 1;
  return q;
}

KL_INLINE Doubles exp2(Doubles t) {
  constexpr double kRoundDouble = 0x1.8p52, kLowest = -1021.0, kHighest = 1000.0;
  Doubles capped = t < kLowest ? Doubles{} + kLowest : t;
  capped = capped > kHighest ? Doubles{} + kHighest : capped;
  const Doubles shifted = capped + kRoundDouble;
  const Doubles f = capped - (shifted - kRoundDouble);
  const Doubles scale = Doubles((DoubleWords(shifted) + 1023u) << 52);
  return t < kLowest ? Doubles{} : exp2_around_zero(f) * scale;
}

// 2^t - 1 for |t| <= 126, within 7e-7 of itself however small t is.
KL_INLINE Floats exp2m1(Floats t) {
  const Floats shifted = t + kRound;
  const Floats f = t - (shifted - kRound);
  const Floats scale = Floats((Words(shifted) + 127u) << 23);
  return scale * (exp2m1_over(f) * f) + (scale - 1.0f);
}

// log2(1 + u) for -1 < u <= 0, within 2.7e-7 of itself however small u is: 1 + u = 2^k (1 + z).
KL_INLINE Floats log2p1(Floats u) {
  const Ints bits = Ints(u + 1.0f), exponent = (bits - kRootOfHalf) & kExponent;
  const Floats z = exponent == 0 ? u : Floats(bits - exponent) - 1.0f;
  return z * log2_over_z(z) + __builtin_convertvector(exponent, Floats) * 0x1p-23f;
}

// cap tanh(x / cap) by e / (e + 2), e = exp(2 x / cap) - 1 kept to full relative precision near 0.
// -inf stays -inf (a token ruled out) and +inf stays +inf (an error to be seen).
KL_INLINE Floats softcapped(Floats x, float cap) {
  const Floats t = x * float(2 * kLog2e / cap);
  Floats magnitude = t < 0.0f ? -t : t;
  magnitude = magnitude > 60.0f ? Floats{} + 60.0f : magnitude;
  const Floats e = exp2m1(magnitude);
  const Floats capped = e / (e + 2.0f) * cap;
  const Floats infinity = Floats{} + INFINITY;
  return ((x == infinity) | (x == -infinity)) ? x : t < 0.0f ? -capped : capped;
}

template <class Vector>
KL_INLINE Vector largest(Vector a, Vector b) {  // b where a is NaN
  return a > b ? a : b;
}

KL_INLINE Floats magnitude(Floats v) { return Floats(Words(v) & 0x7fffffffu); }

// The sum of the lower and the upper lanes.
KL_INLINE Doubles halves(Floats v) {
#if defined(__AVX512F__)
  return Doubles(_mm512_cvtps_pd(_mm512_castps512_ps256(v))) +
         Doubles(_mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
#else
  float lanes[kLanes];
  store(lanes, v);
  return widen(lanes) + widen(lanes + kWideLanes);
#endif
}

KL_INLINE double total(Doubles v) {
  double sum = 0;
  for (int i = 0; i < kWideLanes; ++i) sum += v[i];
  return sum;
}
KL_INLINE double total(Floats v) { return total(halves(v)); }

}  // namespace
}  // namespace kl_kernels
