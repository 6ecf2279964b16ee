// One part of one row of both models, and the loop over the logits in it.
#pragma once

#include "logits.cuh"

namespace kl_kernels {

__device__ inline bool counts(const Rows& rows, uint32_t row) {
  return rows.mask == nullptr || rows.mask[row];
}

__device__ inline int64_t row_offset(const Logits& logits, const Rows& rows, uint32_t row) {
  const uint32_t n_tokens = static_cast<uint32_t>(rows.n_tokens);
  return row / n_tokens * logits.stride_b + row % n_tokens * logits.stride_t;
}

__device__ inline bool in_vocabulary(const Rows& rows, int64_t token) {
  return token >= 0 && token < rows.vocab_size;
}

// NaN for a token outside the vocabulary: nothing is read out of bounds.
template <class T>
__device__ float token_logit(const Logits& logits, const Rows& rows, uint32_t row) {
  const int64_t token = rows.token_ids[row];
  if (!in_vocabulary(rows, token)) return NAN;
  return Row<T>(logits, row_offset(logits, rows, row))[token];
}

// One part of one row, of both models; without a reference y is x.
template <class T, bool kReference>
struct Part {
  Row<T> x, y;
  int size;
  float kx, ky;

  __device__ int whole() const { return size / kLanes * kLanes; }
};

// Which row and which part of it this block is to work on.
struct Place {
  uint32_t row;
  int64_t begin;
};

__device__ inline Place place_of_block(const Split& split) {
  return {blockIdx.x / split.n_parts,
          static_cast<int64_t>(blockIdx.x % split.n_parts) * split.part_size};
}

template <class T, bool kReference>
__device__ Part<T, kReference> part_of(const Rows& rows, const Split& split, const Logits& policy,
                                       const Logits& reference, const Place& place) {
  const Logits& other = kReference ? reference : policy;
  const int64_t left = rows.vocab_size - place.begin;
  return {{policy, row_offset(policy, rows, place.row) + place.begin},
          {other, row_offset(other, rows, place.row) + place.begin},
          static_cast<int>(left < split.part_size ? left : split.part_size),
          policy.k,
          other.k};
}

// Calls `eight(i, x, y)` for every 8 logits of this thread's, from the part's i-th on, and
// `one(i, x, y)` for what is left, in an order that depends on the part's size alone.
template <class Policy, bool kAligned, class T, bool kReference, class Eight, class One>
__device__ __forceinline__ void for_each(const Part<T, kReference>& part, const Eight& eight,
                                         const One& one) {
  using Packed = typename Row<T>::Eight;
  constexpr int kStep = Policy::kThreads * kLanes, kUnroll = Policy::kUnroll;
  const int whole = part.whole();
  int i = threadIdx.x * kLanes;
  for (; i + (kUnroll - 1) * kStep < whole; i += kUnroll * kStep) {
    Packed xs[kUnroll], ys[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) {
      xs[j] = part.x.template eight<kAligned>(i + j * kStep);
      if constexpr (kReference) ys[j] = part.y.template eight<kAligned>(i + j * kStep);
    }
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) eight(i + j * kStep, xs[j], kReference ? ys[j] : xs[j]);
  }
  for (; i < whole; i += kStep) {
    const Packed xs = part.x.template eight<kAligned>(i);
    if constexpr (kReference)
      eight(i, xs, part.y.template eight<kAligned>(i));
    else
      eight(i, xs, xs);
  }
  static_assert(kLanes <= Policy::kThreads, "what is left has to fit into the block");
  i = whole + threadIdx.x;
  if (i < part.size) one(i, part.x[i], kReference ? part.y[i] : part.x[i]);
}

}  // namespace kl_kernels
