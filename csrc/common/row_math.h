// The algebra of one row (token), once for host and device, scalars and vectors of lanes.
//
// x and y are the policy's and the reference's logits after softcap, k = log2(e) / temperature, and
// the anchors A and B are numbers near the largest k x and k y:
//
//     tx = k x - A     w = 2^tx     p = w / sum w     (policy)
//     ty = k y - B     u = 2^ty     q = u / sum u     (reference)
//
// fold absorbs a block of the vocabulary into sums, merge joins the states of two parts, finish
// turns a state into KL divergences and log-probabilities, backward gives the gradient of any mix
// of them. kl_kernels/algebra/row.py says the same in PyTorch and derives nothing more.
//
// `Real` is float or double; fold and backward also take vectors of either (GCC's vector
// extension), which is how the CPU kernels use them.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define KL_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: one object file per instruction set includes this header, and a shared
// out-of-line copy could be the one with instructions the machine lacks.
#define KL_HOST_DEVICE [[gnu::always_inline]] inline
#endif

namespace kl_kernels {

constexpr double kLn2 = 0.69314718055994530942;
constexpr double kLog2e = 1.44269504088896340736;

// The token of a row that is not among these logits; NO_TOKEN in kl_kernels/schemas.py.
constexpr int64_t kNoToken = -(int64_t{1} << 62);

// Tokens of each row that are folded as if the row did not hold them; ids ascend, and from V on
// they skip nothing.
struct SkippedIds {
  const int64_t* ids;  // [B, T, per_row]
  int64_t per_row;

  KL_HOST_DEVICE const int64_t* of(int64_t row) const { return ids + row * per_row; }
};

// The first of n ascending ids that is not below `id`.
KL_HOST_DEVICE int64_t first_from(const int64_t* ids, int64_t n, int64_t id) {
  int64_t first = 0, last = n;
  while (first < last) {
    const int64_t middle = first + (last - first) / 2;
    if (ids[middle] < id)
      first = middle + 1;
    else
      last = middle;
  }
  return first;
}

// The numbers of fields in a part's state; STATE_FIELDS and state_fields() in schemas.py.
constexpr int kStateFields = 9, kStateFieldsWithoutRef = 4;

// kFloor stands for -inf after subtracting an anchor: 2^kFloor is 0, yet kFloor - kFloor is 0 and
// not NaN. The anchor of an empty state lies above it, so that -inf cannot look like a maximum.
template <class Real>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float kEmptyAnchor = -1e38f, kFloor = -3e38f;
};
template <>
struct Limits<double> {
  static constexpr double kEmptyAnchor = -1e300, kFloor = -1e301;
};

template <class Real>
struct Sums {
  Real sx;  // sum w
  Real sy;  // sum u
  Real ex;  // sum w tx
  Real rk;  // sum w (tx - ty)
  Real fk;  // sum u (ty - tx)
};

template <class Real>
struct RowState {
  Real anchor;      // A
  Real ref_anchor;  // B
  Sums<Real> sums;
};

template <class Real>
KL_HOST_DEVICE RowState<Real> empty_state() {
  return {Limits<Real>::kEmptyAnchor, Limits<Real>::kEmptyAnchor, {}};
}

// The one expression every use of an anchor goes through: with a single rounding, an offset common
// to all logits cancels (1e4 would cost 1e-5 otherwise).
KL_HOST_DEVICE float from_anchor(float x, float k, float anchor) { return fmaf(x, k, -anchor); }
KL_HOST_DEVICE double from_anchor(double x, double k, double anchor) { return fma(x, k, -anchor); }

// Absorb one pair of logits.
template <class Real>
KL_HOST_DEVICE void fold_moments(Sums<Real>& s, Real tx, Real ty, Real w, Real u) {
  const Real gap = tx - ty;
  s.ex += w * tx;
  s.rk += w * gap;
  s.fk -= u * gap;
}
template <class Real>
KL_HOST_DEVICE void fold(Sums<Real>& s, Real tx, Real ty, Real w, Real u) {
  s.sx += w;
  s.sy += u;
  fold_moments(s, tx, ty, w, u);
}

// Absorb one logit of a policy without a reference.
template <class Real>
KL_HOST_DEVICE void fold_moments(Sums<Real>& s, Real tx, Real w) {
  s.ex += w * tx;
}
template <class Real>
KL_HOST_DEVICE void fold(Sums<Real>& s, Real tx, Real w) {
  s.sx += w;
  fold_moments(s, tx, w);
}

// Absorb one pair that may hold -inf, with tx and ty no lower than kFloor. p = 0 adds nothing to
// anything; KL is infinite by support, not by size: some x > -inf where y = -inf.
template <class Real>
KL_HOST_DEVICE void fold_by_support(Sums<Real>& s, Real x, Real y, Real tx, Real ty, Real w,
                                    Real u) {
  const Real zero{}, infinity = zero + INFINITY;
  const auto no_x = x == -infinity, no_y = y == -infinity;
  const Real gap = tx - ty;
  const Real reverse = no_y ? infinity : w * gap;
  const Real forward = no_x ? infinity : -u * gap;
  s.sx += w;
  s.sy += u;
  s.ex += w * tx;
  s.rk += no_x ? zero : reverse;
  s.fk += no_y ? zero : forward;
}

// The same sums measured from other anchors: tx becomes tx - da, w becomes w 2^-da. An infinite
// sum stays infinite: scaling it by an underflowed 2^-da would make it NaN.
template <class Real>
KL_HOST_DEVICE RowState<Real> move(const RowState<Real>& s, Real anchor, Real ref_anchor) {
  if (anchor == s.anchor && ref_anchor == s.ref_anchor) return s;
  const Sums<Real>& from = s.sums;
  const Real da = anchor - s.anchor, db = ref_anchor - s.ref_anchor;
  const Real ca = exp2(-da), cb = exp2(-db);
  const Real infinity = INFINITY;
  Sums<Real> to;
  to.sx = ca * from.sx;
  to.sy = cb * from.sy;
  to.ex = ca * (from.ex - da * from.sx);
  to.rk = from.rk == infinity ? infinity : ca * (from.rk - (da - db) * from.sx);
  to.fk = from.fk == infinity ? infinity : cb * (from.fk - (db - da) * from.sy);
  return {anchor, ref_anchor, to};
}

// Bring both states to common anchors and add. Associative up to rounding.
template <class Real>
KL_HOST_DEVICE RowState<Real> merge(const RowState<Real>& s, const RowState<Real>& t) {
  const Real anchor = s.anchor > t.anchor ? s.anchor : t.anchor;
  const Real ref_anchor = s.ref_anchor > t.ref_anchor ? s.ref_anchor : t.ref_anchor;
  RowState<Real> joined = move(s, anchor, ref_anchor);
  const Sums<Real> other = move(t, anchor, ref_anchor).sums;
  joined.sums.sx += other.sx;
  joined.sums.sy += other.sy;
  joined.sums.ex += other.ex;
  joined.sums.rk += other.rk;
  joined.sums.fk += other.fk;
  return joined;
}

// From here on two float anchors are 2^8 apart, and weights of logits between them overflow.
constexpr double kFarthestAnchor = 0x1p31;

// NaN for sums whose anchor is farther from 0 than float anchors reach.
template <class Real>
KL_HOST_DEVICE RowState<Real> within_reach(RowState<Real> s) {
  const Real farthest = kFarthestAnchor;
  if (!(fabs(s.anchor) <= farthest)) s.sums.sx = NAN;
  if (!(fabs(s.ref_anchor) <= farthest)) s.sums.sy = NAN;
  return s;
}

template <class Real>
struct Anchored {
  Real anchor;          // B
  Real sum, ln_of_sum;  // sum u
};
template <class Real>
KL_HOST_DEVICE Anchored<Real> anchored(Real anchor, Real sum) {
  return {anchor, sum, log(sum)};
}

// Statistics of a finished row, in nats; KL and entropy are never negative (NaN stays NaN).
template <class Real>
struct Finished {
  Real logprob, ref_logprob, kl, forward_kl, entropy;
};

template <class Real>
KL_HOST_DEVICE Real at_least_zero(Real value) {
  return value < 0 ? Real(0) : value;
}

// tx and ty are the sampled token's. (A logarithm or a division in float64 is some 50 instructions
// of a GPU, one after another: none is done twice.)
template <class Real>
KL_HOST_DEVICE Finished<Real> finish(const Sums<Real>& s, Real ln_sx, Real ln_sy, Real tx,
                                     Real ty) {
  const Real ln2 = kLn2, over_x = 1 / s.sx, over_y = 1 / s.sy;
  Finished<Real> f;
  f.logprob = ln2 * tx - ln_sx;
  f.ref_logprob = ln2 * ty - ln_sy;
  f.kl = at_least_zero(ln2 * s.rk * over_x - (ln_sx - ln_sy));
  f.forward_kl = at_least_zero(ln2 * s.fk * over_y + (ln_sx - ln_sy));
  f.entropy = at_least_zero(ln_sx - ln2 * s.ex * over_x);
  return f;
}
template <class Real>
KL_HOST_DEVICE Finished<Real> finish(const Sums<Real>& s, Real tx, Real ty) {
  return finish(s, log(s.sx), log(s.sy), tx, ty);
}

// The loss's gradient with respect to each output of one row; 0 where unused.
template <class Real>
struct Upstream {
  Real logprob, kl, forward_kl, entropy;
};

// Whether the row's gradient is 0, whatever its logits.
template <class Real>
KL_HOST_DEVICE bool is_zero(const Upstream<Real>& g) {
  return g.logprob == 0 && g.kl == 0 && g.forward_kl == 0 && g.entropy == 0;
}

// The reference measured from where the policy's mean of tx - ty is nearly 0, for backward. From
// its own maximum, the gradient of a large kl is the small difference of numbers as large as that
// kl. Bounded, because u grows by as much as the anchor sinks.
template <class Real>
KL_HOST_DEVICE Anchored<Real> centred(const Anchored<Real>& ref, Real ln_sx, Real kl) {
  const Real ln2 = kLn2, log2e = kLog2e, bound = 64;
  const Real mean = (kl + ln_sx - ref.ln_of_sum) * log2e;
  const Real anchor = float(ref.anchor - (mean < bound ? mean : bound));
  const Real sunk = ref.anchor - anchor;
  return {anchor, ref.sum * exp2(sunk), ref.ln_of_sum + ln2 * sunk};
}

// A row's gradient is w (a + b tx + c ty) - d u.
template <class Real>
struct Coefficients {
  Real a, b, c, d;
};

// From d logprob = [i = token] - p, d kl = p (log p - log q - kl), d forward_kl = p - q and
// d entropy = -p (log p + entropy), each over the temperature (1 / that is given), with p = w / sx
// and q = u / sy. A zero upstream gradient is selected away before it meets an infinite kl; any
// other makes the whole row NaN, since an infinite kl has no gradient.
template <class Real>
KL_HOST_DEVICE Coefficients<Real> coefficients(const Upstream<Real>& g,
                                               const Anchored<Real>& policy,
                                               const Anchored<Real>& ref, Real kl, Real entropy,
                                               Real over_temperature) {
  const Real ln2 = kLn2, ln_sx = policy.ln_of_sum, ln_sy = ref.ln_of_sum;
  const Real finite_kl = kl == Real(INFINITY) ? Real(NAN) : kl;
  const Real kl_term = g.kl == 0 ? Real(0) : g.kl * (ln_sy - ln_sx - finite_kl);
  const Real entropy_term = g.entropy == 0 ? Real(0) : g.entropy * (ln_sx - entropy);
  const Real over_x = 1 / policy.sum * over_temperature;  // the reciprocal that finish knows
  const Real d = g.forward_kl == 0 ? Real(0) : g.forward_kl / ref.sum * over_temperature;
  return {(kl_term + entropy_term - g.logprob + g.forward_kl) * over_x,
          ln2 * (g.kl - g.entropy) * over_x, -ln2 * g.kl * over_x, d};
}

// The gradient of one logit, all but the token's own + g.logprob / temperature.
template <class Real, class Scalar>
KL_HOST_DEVICE Real backward(const Coefficients<Scalar>& c, Real tx, Real ty, Real w, Real u) {
  return w * (c.a + c.b * tx + c.c * ty) - c.d * u;
}

// The same where no gradient of forward_kl is asked for, and where none of either KL is.
template <class Real, class Scalar>
KL_HOST_DEVICE Real backward(const Coefficients<Scalar>& c, Real tx, Real ty, Real w) {
  return w * (c.a + c.b * tx + c.c * ty);
}
template <class Real, class Scalar>
KL_HOST_DEVICE Real backward(const Coefficients<Scalar>& c, Real tx, Real w) {
  return w * (c.a + c.b * tx);
}

}  // namespace kl_kernels
