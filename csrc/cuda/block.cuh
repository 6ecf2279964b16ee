// Reductions over the threads of a block. Every order is fixed, so results are repeatable.
#pragma once

#include "operators.h"

namespace kl_kernels {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

struct Extent {
  float largest, ref_largest;  // of the logits looked at; NaN is not seen
  float smallest;              // of both models'
};

// Where a block's warps meet: shared memory, for one merge and one join per kernel.
template <int kThreads>
struct WarpScratch {
  RowState<float> states[kThreads / kWarp];
  Extent extents[kThreads / kWarp];
};

__device__ __forceinline__ RowState<float> shuffle_down(const RowState<float>& s, int by) {
  const auto from = [by](float value) { return __shfl_down_sync(kAllLanes, value, by); };
  return {from(s.anchor),
          from(s.ref_anchor),
          {from(s.sums.sx), from(s.sums.sy), from(s.sums.ex), from(s.sums.rk), from(s.sums.fk)}};
}

// The threads' states merged; right in thread 0 alone.
template <int kThreads>
__device__ RowState<float> merge_block(RowState<float> s, WarpScratch<kThreads>& scratch_of_warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int by = kWarp / 2; by > 0; by /= 2) s = merge(s, shuffle_down(s, by));
  if (lane == 0) scratch_of_warps.states[warp] = s;
  __syncthreads();  // without it thread 0 would merge states that are not there yet
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / kWarp; ++i) s = merge(s, scratch_of_warps.states[i]);
  }
  return s;
}

__device__ __forceinline__ Extent join(const Extent& s, const Extent& t) {
  return {fmaxf(s.largest, t.largest), fmaxf(s.ref_largest, t.ref_largest),
          fminf(s.smallest, t.smallest)};
}

// The threads' extents joined, in every thread.
template <int kThreads>
__device__ Extent join_block(Extent e, WarpScratch<kThreads>& scratch_of_warps) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int by = kWarp / 2; by > 0; by /= 2) {
    e = join(e, {__shfl_xor_sync(kAllLanes, e.largest, by),
                 __shfl_xor_sync(kAllLanes, e.ref_largest, by),
                 __shfl_xor_sync(kAllLanes, e.smallest, by)});
  }
  if (lane == 0) scratch_of_warps.extents[warp] = e;
  __syncthreads();  // without it a thread would read extents that are not there yet
  e = scratch_of_warps.extents[0];
  for (int i = 1; i < kThreads / kWarp; ++i) e = join(e, scratch_of_warps.extents[i]);
  return e;
}

__device__ inline RowState<double> widened(const RowState<float>& s) {
  return {s.anchor, s.ref_anchor, {s.sums.sx, s.sums.sy, s.sums.ex, s.sums.rk, s.sums.fk}};
}

__device__ inline Finished<float> rounded(const Finished<double>& f) {
  return {static_cast<float>(f.logprob), static_cast<float>(f.ref_logprob),
          static_cast<float>(f.kl), static_cast<float>(f.forward_kl),
          static_cast<float>(f.entropy)};
}

}  // namespace kl_kernels
