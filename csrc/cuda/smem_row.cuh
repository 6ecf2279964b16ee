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
// enough, but then twice as many words must be selected from.)
template <class T>
__device__ __forceinline__ Packed<T> load_across(const T* at) {
  constexpr int kWords = Packed<T>::kWords, kPairs = kWords / 2 + 1;
  const int begin = misalignment(at) % 8;
  const uint2* const pairs =
      reinterpret_cast<const uint2*>(reinterpret_cast<const char*>(at) - begin);
  uint32_t words[2 * kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    // Words that are not needed may not be there yet.
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
class SmemRow {
 public:
  using Element = T;
  using Vector = Packed<T>;

  // Room for `size` logits, and before the first for its misalignment.
  __host__ __device__ static int64_t bytes(int64_t size) { return (size + kLanes) * sizeof(T); }

  // A copy of the part that begins at `from`.
  __device__ SmemRow(void* memory, const T* from)
      : at_(static_cast<T*>(memory) + misalignment(from) / static_cast<int>(sizeof(T))) {}

  __device__ bool aligned(int i) const { return is_aligned(at_ + i); }
  __device__ T* at(int i) const { return at_ + i; }
  __device__ float operator[](int64_t i) const { return to_float(at_[i]); }
  template <bool kAligned>
  __device__ __forceinline__ Vector vector_at(int i) const {
    if constexpr (kAligned)
      return load<true, Cache::keep>(at_ + i);
    else
      return load_across(at_ + i);
  }

 private:
  T* at_;
};

// Fetching is divided in stages: the first are folded while the last are on their way.
constexpr int kStages = 4;

// Until the block's copies of that stage are there, and those of the stages before it.
__device__ __forceinline__ void await_stage(int stage) {
  static_assert(kStages == 4, "one case for each");
  if (stage == 0) wait_for_copies<3>();
  if (stage == 1) wait_for_copies<2>();
  if (stage == 2) wait_for_copies<1>();
  if (stage == 3) wait_for_copies<0>();
  __syncthreads();  // without it a thread would read what another one's copies have not brought yet
}

template <class R, bool kHasRef>
struct ArrivingPart : Part<R, kHasRef> {
  int stage;  // logits, whole tiles

  __device__ int begin(int i) const {
    const int at = i * stage, tail = this->span.tail();
    return at < tail ? at : tail;
  }
};

template <bool, class R, bool kHasRef>
__device__ __forceinline__ FirstTile<R> begin_first_tile(const ArrivingPart<R, kHasRef>&, int) {
  return {};
}
template <bool kAligned, class R, bool kHasRef>
__device__ __forceinline__ void await_first_tile(const ArrivingPart<R, kHasRef>& part, int i,
                                                 FirstTile<R>& tile) {
  await_stage(0);
  if (i >= part.span.tail()) return;
  tile.x = part.x.template vector_at<kAligned>(i);
  tile.y = part.y.template vector_at<kAligned>(i);
}

// As for parts in global memory, each stage once it is there, as the first is since the first tile.
template <class Policy, bool kAligned, class R, bool kHasRef, class EachVector, class One>
__device__ __forceinline__ void for_each(const ArrivingPart<R, kHasRef>& part,
                                         const EachVector& each_vector, const One& one) {
  for (int i = 0; i < kStages; ++i) {
    if (i > 0) await_stage(i);
    for_each_vector<Policy, kAligned, Order::forwards>(part, part.begin(i), part.begin(i + 1),
                                                       each_vector);
  }
  for_each_left<Policy>(part, one);
}

// The stretch of a row that is copied in whole vectors; the rest shares vectors with other rows.
template <class T>
__device__ Span vectors_of(const Row<T>& row, int size) {
  return {size, until_aligned(row.at(0), sizeof(T))};
}

// Begins to copy the vectors with logits before `end` that do not have any before `begin`.
template <class Policy, class T>
__device__ __forceinline__ void fetch(const Row<T>& from, const SmemRow<T>& to, const Span& vectors,
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

template <class Policy, class T, bool kHasRef>
__device__ ArrivingPart<SmemRow<T>, kHasRef> copy_to_smem(const Part<Row<T>, kHasRef>& part,
                                                          void* memory, int size) {
  constexpr int kTile = Policy::kThreads * kLanes, kPerVector = kAlignment / sizeof(T);
  const int tiles = (part.span.tail() + kTile - 1) / kTile, n = part.span.size;
  const SmemRow<T> x(memory, part.x.at(0));
  const SmemRow<T> y(static_cast<char*>(memory) + SmemRow<T>::bytes(size), part.y.at(0));
  const ArrivingPart<SmemRow<T>, kHasRef> in_smem{{x, kHasRef ? y : x, part.span, part.kx, part.ky},
                                                  (tiles + kStages - 1) / kStages * kTile};
  const Span xs = vectors_of(part.x, n), ys = vectors_of(part.y, n);
  for (int i = 0; i < kStages; ++i) {
    const int begin = in_smem.begin(i), end = i < kStages - 1 ? in_smem.begin(i + 1) : n;
    fetch<Policy>(part.x, x, xs, begin, end);
    if constexpr (kHasRef) fetch<Policy>(part.y, y, ys, begin, end);
    commit_copies();
  }
  // Loaded both before one of them is waited for.
  const int i = xs.left(kPerVector), j = ys.left(kPerVector);
  T left{}, ref_left{};
  if (i < n) left = *part.x.at(i);
  if (kHasRef && j < n) ref_left = *part.y.at(j);
  if (i < n) *x.at(i) = left;
  if (kHasRef && j < n) *y.at(j) = ref_left;
  return in_smem;
}

}  // namespace kl_kernels
