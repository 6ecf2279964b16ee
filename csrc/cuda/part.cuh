// One part of one row of both models, and the loop over the logits in it.
#pragma once

#include "logits.cuh"

namespace kl_kernels {

__device__ inline bool counts(const Rows& rows, uint32_t row) {
  return rows.mask == nullptr || rows.mask[row];
}

template <class Strided>  // Logits or GradLogits
__device__ int64_t row_offset(const Strided& tensor, const Rows& rows, uint32_t row) {
  const uint32_t n_tokens = static_cast<uint32_t>(rows.n_tokens);
  return row / n_tokens * tensor.stride_b + row % n_tokens * tensor.stride_t;
}

__device__ inline bool in_vocabulary(const Rows& rows, int64_t token) {
  return token >= 0 && token < rows.vocab_size;
}

// Outside the vocabulary where none is sampled.
__device__ inline int64_t token_of(const Rows& rows, uint32_t row) {
  return rows.token_ids == nullptr ? kNoToken : rows.token_ids[row];
}

// NaN for a token outside the vocabulary, elsewhere or not sampled: nothing is read out of bounds.
template <class T>
__device__ float token_logit(const Logits& logits, const Rows& rows, uint32_t row, int64_t token) {
  if (!in_vocabulary(rows, token)) return NAN;
  return Row<T>(logits, row_offset(logits, rows, row))[token];
}

// Logits that are taken in groups, but for the first few, fewer than a group, and what is left
// behind the last one. (There may be fewer logits than that: none is in a group then.)
struct Span {
  int size, head;

  __device__ int tail(int group = kLanes) const { return head + (size - head) / group * group; }
  // The one logit left to this thread alone; none, if that is not below `size`.
  __device__ int left(int group = kLanes) const {
    const int i = threadIdx.x;
    return i < head ? i : tail(group) + i - head;
  }
};

// First aligned element of the gradient. A logit's gradient does not depend on how logits are
// grouped, so vectors may start there; reductions group from the first logit, to be reproducible.
template <class T>
__device__ Span span_of(const GradRow<T>& grad, int size) {
  return {size, grad.until_aligned()};
}

// One part of one row, of both models, as a kind of row R; without a reference y is x.
template <class R, bool kHasRef>
struct Part {
  R x, y;
  Span span;
  float kx, ky;

  // Whether every 8 of both are.
  __device__ bool aligned() const { return x.aligned(span.head) && y.aligned(span.head); }
};

template <class R, bool kHasRef>
__device__ Part<R, false> without_reference(const Part<R, kHasRef>& part) {
  return {part.x, part.x, part.span, part.kx, part.kx};
}

// The same part, to be gone through as its gradient is to be written.
template <class R, bool kHasRef, class T>
__device__ Part<R, kHasRef> aligned_to(const GradRow<T>& grad, Part<R, kHasRef> part) {
  part.span = span_of(grad, part.span.size);
  return part;
}

// The row, and the split of it, that this block works on.
struct SplitOfRow {
  uint32_t row, part;
  int64_t begin;
  int size;
};

__device__ inline SplitOfRow split_of_row(uint32_t part_of_all, const Rows& rows,
                                          const Split& split) {
  const uint32_t part = part_of_all % split.n_parts;
  const int64_t begin = static_cast<int64_t>(part) * split.part_size;
  const int64_t left = rows.vocab_size - begin;
  return {part_of_all / split.n_parts, part, begin,
          static_cast<int>(left < split.part_size ? left : split.part_size)};
}

template <class R, bool kHasRef>
__device__ Part<R, kHasRef> part_of(const Rows& rows, const Logits& policy, const Logits& reference,
                                    const SplitOfRow& place) {
  const Logits& other = kHasRef ? reference : policy;
  return {{policy, row_offset(policy, rows, place.row) + place.begin},
          {other, row_offset(other, rows, place.row) + place.begin},
          {place.size, 0},
          policy.k,
          other.k};
}

template <class T>
__device__ GradRow<T> grad_row_of(const Rows& rows, const Logits& policy,
                                  const GradLogits& grad_logits, const SplitOfRow& place) {
  return {grad_logits.data, policy, row_offset(grad_logits, rows, place.row) + place.begin};
}

enum class Order { forwards, backwards };

// Loads of 8 logits (of each model) that a thread has under way at once.
template <class Policy, class R, bool kHasRef>
constexpr int unroll_of =
    kHasRef || std::is_same_v<typename R::Element, Any> ? Policy::kUnroll
                                                        : Policy::kUnrollWithoutRef;

// Calls `each_vector(i, x, y)` for every 8 logits of this thread's, from the part's i-th on,
// between `begin` and `end`, which are multiples of 8 apart.
template <class Policy, bool kAligned, Order kOrder, class R, bool kHasRef, class EachVector>
__device__ __forceinline__ void for_each_vector(const Part<R, kHasRef>& part, int begin, int end,
                                                const EachVector& each_vector) {
  using Packed = typename R::Vector;
  constexpr bool kForwards = kOrder == Order::forwards;
  constexpr int kTile = Policy::kThreads * kLanes;
  constexpr int kUnroll = unroll_of<Policy, R, kHasRef>;
  constexpr int kStep = kForwards ? kTile : -kTile;
  const int first = begin + threadIdx.x * kLanes;
  if (!kForwards && first >= end) return;
  const auto within = [=](int i) { return kForwards ? i < end : i >= begin; };
  int i = kForwards ? first : first + (end - 1 - first) / kTile * kTile;
  for (; within(i + (kUnroll - 1) * kStep); i += kUnroll * kStep) {
    Packed xs[kUnroll], ys[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      xs[j] = part.x.template vector_at<kAligned>(i + j * kStep);
      if constexpr (kHasRef) ys[j] = part.y.template vector_at<kAligned>(i + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) each_vector(i + j * kStep, xs[j], kHasRef ? ys[j] : xs[j]);
  }
  for (; within(i); i += kStep) {
    const Packed xs = part.x.template vector_at<kAligned>(i);
    if constexpr (kHasRef)
      each_vector(i, xs, part.y.template vector_at<kAligned>(i));
    else
      each_vector(i, xs, xs);
  }
}

// Calls `one(i, x, y)` for the logits that are in no 8.
template <class Policy, class R, bool kHasRef, class One>
__device__ __forceinline__ void for_each_left(const Part<R, kHasRef>& part, const One& one) {
  static_assert(2 * kLanes <= Policy::kThreads, "what is left must fit into the block");
  const int i = part.span.left();
  if (i < part.span.size) one(i, part.x[i], kHasRef ? part.y[i] : part.x[i]);
}

// Both, in an order that depends on the part's span alone.
template <class Policy, bool kAligned, Order kOrder = Order::forwards, class R, bool kHasRef,
          class EachVector, class One>
__device__ __forceinline__ void for_each(const Part<R, kHasRef>& part,
                                         const EachVector& each_vector, const One& one) {
  for_each_vector<Policy, kAligned, kOrder>(part, part.span.head, part.span.tail(), each_vector);
  for_each_left<Policy>(part, one);
}

// This thread's 8 logits of the first tile, of both models, if there are any.
template <class R>
struct FirstTile {
  typename R::Vector x, y;
};

// The first tile of a part in global memory, on its way as soon as this is called.
template <bool kAligned, class R, bool kHasRef>
__device__ __forceinline__ FirstTile<R> begin_first_tile(const Part<R, kHasRef>& part, int i) {
  FirstTile<R> tile{};
  if (i < part.span.tail()) {
    tile.x = part.x.template vector_at<kAligned>(i);
    tile.y = kHasRef ? part.y.template vector_at<kAligned>(i) : tile.x;
  }
  return tile;
}
template <bool kAligned, class R, bool kHasRef>
__device__ __forceinline__ void await_first_tile(const Part<R, kHasRef>&, int, FirstTile<R>&) {}

// Whether it is this thread that for_each brings to logit i.
template <class Policy>
__device__ bool owns(int i, const Span& span) {
  if (i < span.head || i >= span.tail()) return i == span.left();
  return (i - span.head) / kLanes % Policy::kThreads == static_cast<int>(threadIdx.x);
}

template <class Policy, class T>
__device__ void write_zeros(const GradRow<T>& grad, int size) {
  const Span span = span_of(grad, size);
  float zeros[kLanes] = {};
  for (int i = span.head + threadIdx.x * kLanes; i < span.tail(); i += Policy::kThreads * kLanes)
    grad.put_vector(i, zeros, zeros);
  const int i = span.left();
  if (i < size) grad.put(i, 0.0f, 0.0f);
}

}  // namespace kl_kernels
