// A part of a row that stays in shared memory, so that it can be looked at again.
//
// It lies there as in global memory, as far from an aligned address: whole vectors of 16 bytes can
// be copied asynchronously, aligned or not, and the gradient, which is as far from one in general,
// takes aligned vectors of both. Only the fold then reads across them, from shared memory.
#pragma once

#include "part.cuh"
#include "primitives.cuh"

namespace kl_kernels {

// 8 neighbouring logits in shared memory that begin anywhere. (Of vectors of 16 bytes two would be
// enough, but then twice as many words have to be selected from.)
template <class T>
__device__ __forceinline__ Packed<T> load_across(const T* at) {
  constexpr int kWords = Packed<T>::kWords, kPairs = kWords / 2 + 1;
  const int begin = misalignment(at) % 8;
  const uint2* const pairs =
      reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(at) - begin);
  uint32_t words[2 * kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    // What is not needed may not be there yet.
    const uint2 pair = pairs[i < kPairs - 1 || begin != 0 ? i : i - 1];
    words[2 * i] = pair.x;
    words[2 * i + 1] = pair.y;
  }
#pragma unroll
  for (int i = 0; i + 1 < 2 * kPairs; ++i) words[i] = begin < 4 ? words[i] : words[i + 1];
  Packed<T> packed;
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    packed.words[i] =
        sizeof(T) == 4 ? words[i] : __funnelshift_r(words[i], words[i + 1], begin % 4 * 8);
  }
  return packed;
}

template <class T>
class HeldRow {
 public:
  using Element = T;
  using Eight = Packed<T>;

  // Of up to `size` logits, and before the first what makes up for its misalignment.
  __host__ __device__ static int64_t bytes(int64_t size) { return (size + kLanes) * sizeof(T); }

  // Of a part that begins at `from`.
  __device__ HeldRow(void* memory, const T* from)
      : at_(static_cast<T*>(memory) + misalignment(from) / static_cast<int>(sizeof(T))) {}

  __device__ bool aligned(int i) const { return is_aligned(at_ + i); }
  __device__ T* at(int i) const { return at_ + i; }
  __device__ float operator[](int64_t i) const { return to_float(at_[i]); }
  template <bool kAligned>
  __device__ __forceinline__ Eight eight(int i) const {
    if constexpr (kAligned)
      return load<true, Cache::keep>(at_ + i);
    else
      return load_across(at_ + i);
  }

 private:
  T* at_;
};

// Fetching is divided in waves: the first are folded while the last are on their way.
constexpr int kWaves = 4;

// Until the block's copies of that wave are there, and those of the waves before it.
__device__ __forceinline__ void await_wave(int wave) {
  static_assert(kWaves == 4, "one case for each");
  if (wave == 0) wait_for_copies<3>();
  if (wave == 1) wait_for_copies<2>();
  if (wave == 2) wait_for_copies<1>();
  if (wave == 3) wait_for_copies<0>();
  __syncthreads();  // without it a thread would read what another one's copies have not brought yet
}

template <class R, bool kReference>
struct Arriving : Part<R, kReference> {
  int wave;  // logits, whole tiles

  __device__ int begin(int i) const {
    const int at = i * wave, tail = this->span.tail();
    return at < tail ? at : tail;
  }
};

template <bool, class R, bool kReference>
__device__ __forceinline__ FirstTile<R> begin_first_tile(const Arriving<R, kReference>&, int) {
  return {};
}
template <bool kAligned, class R, bool kReference>
__device__ __forceinline__ void await_first_tile(const Arriving<R, kReference>& part, int i,
                                                 FirstTile<R>& tile) {
  await_wave(0);
  if (i >= part.span.tail()) return;
  tile.x = part.x.template eight<kAligned>(i);
  tile.y = part.y.template eight<kAligned>(i);
}

// As for parts in global memory, each wave once it is there, as the first is since the first tile.
template <class Policy, bool kAligned, class R, bool kReference, class Eight, class One>
__device__ __forceinline__ void for_each(const Arriving<R, kReference>& part, const Eight& eight,
                                         const One& one) {
  for (int i = 0; i < kWaves; ++i) {
    if (i > 0) await_wave(i);
    for_each_eight<Policy, kAligned, Order::forwards>(part, part.begin(i), part.begin(i + 1),
                                                      eight);
  }
  for_each_left<Policy>(part, one);
}

// What of a row is copied in vectors; the others lie in vectors that do not belong to it alone.
template <class T>
__device__ Span vectors_of(const Row<T>& row, int size) {
  return {size, until_aligned(row.at(0), sizeof(T))};
}

// Begins to copy the vectors with logits before `end` that do not have any before `begin`.
template <class Policy, class T>
__device__ __forceinline__ void fetch(const Row<T>& from, const HeldRow<T>& to, const Span& vectors,
                                      int begin, int end) {
  constexpr int kPerVector = kAlignment / sizeof(T);
  const int head = vectors.head, tail = vectors.tail(kPerVector);
  const auto next_vector = [=](int i) {
    const int vector = head + (i - head + kPerVector - 1) / kPerVector * kPerVector;
    return vector < tail ? vector : tail;
  };
  const int stop = next_vector(end);
#pragma unroll 4
  for (int i = next_vector(begin) + threadIdx.x * kPerVector; i < stop;
       i += Policy::kThreads * kPerVector)
    copy_async(to.at(i), from.at(i));
}

template <class Policy, class T, bool kReference>
__device__ Arriving<HeldRow<T>, kReference> hold(const Part<Row<T>, kReference>& part, void* memory,
                                                 int size) {
  constexpr int kTile = Policy::kThreads * kLanes, kPerVector = kAlignment / sizeof(T);
  const int tiles = (part.span.tail() + kTile - 1) / kTile, n = part.span.size;
  const HeldRow<T> x(memory, part.x.at(0));
  const HeldRow<T> y(static_cast<char*>(memory) + HeldRow<T>::bytes(size), part.y.at(0));
  const Arriving<HeldRow<T>, kReference> held{{x, kReference ? y : x, part.span, part.kx, part.ky},
                                              (tiles + kWaves - 1) / kWaves * kTile};
  const Span xs = vectors_of(part.x, n), ys = vectors_of(part.y, n);
  for (int i = 0; i < kWaves; ++i) {
    const int begin = held.begin(i), end = i < kWaves - 1 ? held.begin(i + 1) : n;
    fetch<Policy>(part.x, x, xs, begin, end);
    if constexpr (kReference) fetch<Policy>(part.y, y, ys, begin, end);
    commit_copies();
  }
  // Loaded both before one of them is waited for.
  const int i = xs.left(kPerVector), j = ys.left(kPerVector);
  T left{}, ref_left{};
  if (i < n) left = *part.x.at(i);
  if (kReference && j < n) ref_left = *part.y.at(j);
  if (i < n) *x.at(i) = left;
  if (kReference && j < n) *y.at(j) = ref_left;
  return held;
}

}  // namespace kl_kernels
