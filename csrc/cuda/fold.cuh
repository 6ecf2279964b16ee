// The forward pass over one part of a row: its logits, read once, become a state.
//
// The fast loop has no maximum, no rescaling and no test: it measures from anchors fixed
// beforehand, the larger of the first tile's maximum and the sampled token's logit (which is nearly
// always close to the top). Where -inf is seen beforehand, the guarded loop does the same and takes
// it for what it is. Whatever defeats them (NaN, a peak far above the anchor, -inf for the fast
// loop) shows in the sums, and the running-max loop folds that part again. The
// choice and the split into parts depend on the row alone.
#pragma once

#include "block.cuh"
#include "part.cuh"
#include "primitives.cuh"

namespace kl_kernels {

// The most weight that one thread's sums may hold: of 256 pairs an average of 2. One peak far above
// its anchor is what costs digits: its terms are large, and every later one is rounded to theirs.
constexpr float kCrowded = 512;

// A probe of a part by one thread, without going through it: the rest of the last 8, the last
// logit, which is where -inf pads, and the token's logits, which may be NaN and of another part.
template <class Policy, class R, bool kHasRef>
__device__ Extent token_extent(const Part<R, kHasRef>& part, float token_x, float token_y) {
  const int last = part.span.size - 1;
  const float x = part.x[last], y = kHasRef ? part.y[last] : x;
  Extent e{fmaxf(x, token_x), fmaxf(y, token_y), fminf(x, y)};
  for_each_left<Policy>(part, [&e](int, float x, float y) { e = join(e, {x, y, fminf(x, y)}); });
  return e;
}

// The same and the first tile: where to anchor, and whether -inf is about. Threads stop at the
// first use of what they load: the tile, which needs nothing but the row's address, is on its way
// before `token_extent` is called, which waits for the token and its logits.
template <class Policy, bool kAligned, class P, class TokenExtent>
__device__ Extent probe(const P& part, const TokenExtent& token_extent,
                        WarpScratch<Policy::kThreads>& scratch_of_warps) {
  const int i = threadIdx.x * kLanes;
  auto tile = begin_first_tile<kAligned>(part, i);
  Extent e = token_extent();
  await_first_tile<kAligned>(part, i, tile);
  if (i < part.span.tail()) {
    float x[kLanes], y[kLanes];
    unpack(tile.x, x);
    unpack(tile.y, y);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) e = join(e, {x[j], y[j], fminf(x[j], y[j])});
  }
  return join_block(e, scratch_of_warps);
}

// Whether this thread's sums cannot be kept.
__device__ inline bool defeated(const Sums<float>& s) {
  return !isfinite(s.sx + s.sy + s.ex + s.rk + s.fk) || s.sx > kCrowded || s.sy > kCrowded;
}

// The fast loop or, guarded, one that takes -inf as fold_by_support does, in 5 instructions more.
// `failed`: this thread's sums cannot be kept.
template <class Policy, bool kAligned, bool kHasRef, bool kGuarded, class P>
__device__ __forceinline__ RowState<float> fold_anchored(const P& part, float anchor,
                                                         float ref_anchor, bool& failed) {
  const float kx = part.kx, ky = part.ky;
  Sums<float> s{};
  // Extremes of x - y: infinite where only one of them is -inf, and NaN, which both extremes drop,
  // where both are.
  float lowest = 0, highest = 0;
  const auto measure = [](float logit, float k, float from) {
    const float t = from_anchor(logit, k, from);
    return kGuarded ? max_or_nan(t, Limits<float>::kFloor) : t;
  };
  const auto absorb = [&](float x, float y) {
    const float tx = measure(x, kx, anchor);
    if constexpr (kHasRef) {
      const float ty = measure(y, ky, ref_anchor);
      fold(s, tx, ty, exp2f(tx), exp2f(ty));
      if constexpr (kGuarded) {
        lowest = fminf(lowest, x - y);
        highest = fmaxf(highest, x - y);
      }
    } else {
      fold(s, tx, exp2f(tx));
    }
  };
  const auto each_vector = [&](int, const auto& xs, const auto& ys) {
    float x[kLanes], y[kLanes];
    unpack(xs, x);
    unpack(ys, y);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) absorb(x[j], y[j]);
  };
  const auto one = [&](int, float x, float y) { absorb(x, y); };
  for_each<Policy, kAligned>(part, each_vector, one);
  const bool infinite_rk = highest == INFINITY, infinite_fk = lowest == -INFINITY;
  if (infinite_rk) s.rk = 0;  // whatever kFloor made of it
  if (infinite_fk) s.fk = 0;
  failed = defeated(s);
  if (infinite_rk) s.rk = INFINITY;
  if (infinite_fk) s.fk = INFINITY;
  return {anchor, ref_anchor, s};
}

// Each thread measures from the largest logits it has seen so far.
template <class Policy, bool kAligned, class P>
__device__ RowState<float> fold_running_max(const P& part) {
  constexpr float kFloor = Limits<float>::kFloor;
  const float kx = part.kx, ky = part.ky;
  RowState<float> s = empty_state<float>();
  const auto raise_anchors = [&](float x, float y) {
    const float anchor = fmaxf(s.anchor, kx * x), ref_anchor = fmaxf(s.ref_anchor, ky * y);
    if (anchor > s.anchor || ref_anchor > s.ref_anchor) s = move(s, anchor, ref_anchor);
  };
  const auto absorb = [&](float x, float y) {
    float tx = from_anchor(x, kx, s.anchor), ty = from_anchor(y, ky, s.ref_anchor);
    tx = max_or_nan(tx, kFloor);
    ty = max_or_nan(ty, kFloor);
    fold_by_support(s.sums, x, y, tx, ty, exp2f(tx), exp2f(ty));
  };
  const auto one = [&](int, float x, float y) {
    raise_anchors(x, y);
    absorb(x, y);
  };
  const auto each_vector = [&](int, const auto& xs, const auto& ys) {
    float x[kLanes], y[kLanes];
    unpack(xs, x);
    unpack(ys, y);
    float largest = x[0], ref_largest = y[0];
#pragma unroll
    for (int j = 1; j < kLanes; ++j) {
      largest = fmaxf(largest, x[j]);
      ref_largest = fmaxf(ref_largest, y[j]);
    }
    raise_anchors(largest, ref_largest);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) absorb(x[j], y[j]);
  };
  for_each<Policy, kAligned>(part, each_vector, one);
  return s;
}

// The part's state; right in thread 0 alone. `token_extent` gives what is known of it beforehand.
template <class Policy, bool kAligned, bool kHasRef, class P, class TokenExtent>
__device__ RowState<float> fold_part(const P& part, const TokenExtent& token_extent,
                                     WarpScratch<Policy::kThreads>& scratch_of_warps) {
  const Extent e = probe<Policy, kAligned>(part, token_extent, scratch_of_warps);
  const float anchor = part.kx * e.largest, ref_anchor = part.ky * e.ref_largest;
  const bool minus_infinity = fmaxf(part.kx, part.ky) * e.smallest == -INFINITY;  // or finfo.min
  RowState<float> s = empty_state<float>();
  bool running_max = fminf(anchor, ref_anchor) == -INFINITY;  // the same in all threads
  if (!running_max) {
    bool failed;
    const auto fold = [&](auto guarded) {
      constexpr bool kGuarded = decltype(guarded)::value;
      return fold_anchored<Policy, kAligned, kHasRef, kGuarded>(part, anchor, ref_anchor, failed);
    };
    if constexpr (Policy::kFastLoop)
      s = minus_infinity ? fold(std::true_type{}) : fold(std::false_type{});
    else
      s = fold(std::true_type{});
    running_max = __syncthreads_or(failed);
  }
  if (running_max) s = fold_running_max<Policy, kAligned>(part);
  return merge_block(s, scratch_of_warps);
}

}  // namespace kl_kernels
