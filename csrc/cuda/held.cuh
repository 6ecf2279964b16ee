// A part of a row that stays in shared memory, so that it can be looked at again.
//
// A thread reads back only what it has put there itself: nothing has to be synchronised.
#pragma once

#include "part.cuh"
#include "primitives.cuh"

namespace kl_kernels {

// 8 logits lie as one vector of 16 bytes in 16-bit types, as two in float32: those in planes of
// their own, so that neighbouring lanes reach neighbouring vectors.
template <class T>
class HeldRow {
 public:
  using Element = T;
  using Eight = Packed<T>;

  // Of up to `size` logits, a multiple of 8, and what is left beside them.
  __host__ __device__ static int64_t bytes(int64_t size) { return (size + kLanes) * sizeof(T); }

  __device__ HeldRow(void* memory, int size, int whole)
      : memory_(static_cast<char*>(memory)), plane_(size * kBytesPerLogit), whole_(whole) {}

  template <bool>
  __device__ __forceinline__ Eight eight(int i) const {
    Eight packed;
#pragma unroll
    for (int v = 0; v < Eight::kVectors; ++v) packed.set_vector(v, *vector(v, i));
    return packed;
  }
  __device__ float operator[](int64_t i) const { return to_float(*at(static_cast<int>(i))); }

  // Begins to fetch 8 logits, at once if they are not aligned.
  template <bool kAligned>
  __device__ __forceinline__ void fetch(const Row<T>& from, int i) const {
    if constexpr (kAligned) {
      const uint4* const vectors = reinterpret_cast<const uint4*>(from.at(i));
#pragma unroll
      for (int v = 0; v < Eight::kVectors; ++v)
        copy_async<(Eight::kVectors > 1)>(vector(v, i), vectors + v);
    } else {
      const Eight packed = from.template eight<false>(i);
#pragma unroll
      for (int v = 0; v < Eight::kVectors; ++v) *vector(v, i) = packed.vector(v);
    }
  }
  __device__ void fetch_one(const Row<T>& from, int i) const { *at(i) = *from.at(i); }

 private:
  static constexpr int kBytesPerLogit = 16 / kLanes;  // of a plane

  __device__ __forceinline__ uint4* vector(int v, int i) const {
    return reinterpret_cast<uint4*>(memory_ + v * plane_ + i * kBytesPerLogit);
  }
  __device__ T* at(int i) const {
    constexpr int kPerVector = 16 / sizeof(T);
    if (i >= whole_) return reinterpret_cast<T*>(vector(Eight::kVectors, 0)) + (i - whole_);
    const int lane = i % kLanes;
    return reinterpret_cast<T*>(vector(lane / kPerVector, i - lane)) + lane % kPerVector;
  }

  char* memory_;
  int plane_;  // bytes
  int whole_;
};

// Fetching is divided in waves: the first are folded while the last are on their way.
constexpr int kWaves = 4;

__device__ __forceinline__ void wait_for_wave(int wave) {
  static_assert(kWaves == 4, "one case for each");
  if (wave == 0) wait_for_copies<3>();
  if (wave == 1) wait_for_copies<2>();
  if (wave == 2) wait_for_copies<1>();
  if (wave == 3) wait_for_copies<0>();
}

template <class R, bool kReference>
struct Arriving : Part<R, kReference> {
  int wave;  // logits, whole tiles

  __device__ int begin(int i) const {
    const int at = i * wave, whole = this->whole();
    return at < whole ? at : whole;
  }
};

template <bool, class R, bool kReference>
__device__ __forceinline__ FirstTile<R> begin_first_tile(const Arriving<R, kReference>&, int) {
  return {};
}
template <class R, bool kReference>
__device__ __forceinline__ void await_first_tile(const Arriving<R, kReference>& part, int i,
                                                 FirstTile<R>& tile) {
  wait_for_wave(0);
  if (i >= part.whole()) return;
  tile.x = part.x.template eight<true>(i);
  tile.y = part.y.template eight<true>(i);
}

// As for parts in global memory, each wave once it is there.
template <class Policy, bool kAligned, class R, bool kReference, class Eight, class One>
__device__ __forceinline__ void for_each(const Arriving<R, kReference>& part, const Eight& eight,
                                         const One& one) {
  for (int i = 0; i < kWaves; ++i) {
    wait_for_wave(i);
    for_each_eight<Policy, true, Order::forwards>(part, part.begin(i), part.begin(i + 1), eight);
  }
  for_each_left<Policy>(part, one);
}

// Begins to fetch a part into shared memory.
template <class Policy, bool kAligned, class T>
__device__ __forceinline__ void fetch(const Row<T>& from, const HeldRow<T>& to, int begin,
                                      int end) {
#pragma unroll 4
  for (int i = begin + threadIdx.x * kLanes; i < end; i += Policy::kThreads * kLanes)
    to.template fetch<kAligned>(from, i);
}

template <class Policy, class T, bool kReference>
__device__ Arriving<HeldRow<T>, kReference> hold(const Part<Row<T>, kReference>& part, void* memory,
                                                 int size) {
  constexpr int kTile = Policy::kThreads * kLanes;
  const int whole = part.whole(), tiles = (whole + kTile - 1) / kTile;
  const HeldRow<T> x(memory, size, whole);
  const HeldRow<T> y(static_cast<char*>(memory) + HeldRow<T>::bytes(size), size, whole);
  const Arriving<HeldRow<T>, kReference> held{{x, kReference ? y : x, part.size, part.kx, part.ky},
                                              (tiles + kWaves - 1) / kWaves * kTile};
  const auto fetch_from = [](const Row<T>& from, const HeldRow<T>& to, int begin, int end) {
    from.aligned() ? fetch<Policy, true>(from, to, begin, end)
                   : fetch<Policy, false>(from, to, begin, end);
  };
  for (int i = 0; i < kWaves; ++i) {
    fetch_from(part.x, x, held.begin(i), held.begin(i + 1));
    if constexpr (kReference) fetch_from(part.y, y, held.begin(i), held.begin(i + 1));
    commit_copies();
  }
  const int i = whole + threadIdx.x;
  if (i < part.size) {
    x.fetch_one(part.x, i);
    if constexpr (kReference) y.fetch_one(part.y, i);
  }
  return held;
}

}  // namespace kl_kernels
