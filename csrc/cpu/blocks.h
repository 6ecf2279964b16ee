// A row's logits, a block of the vocabulary at a time: as they lie in memory, or staged as floats
// where they first must be softcapped, brought to one type or padded to whole vectors.
#pragma once

#include "row.h"
#include "simd.h"

namespace kl_kernels {
namespace {

// Large enough to hide what is done once per block, small enough that a block folded a second time
// and the staging buffers are in the first-level cache.
constexpr int64_t kBlock = 2048;

struct Block {
  int64_t start, size;
};

KL_INLINE Block block_at(int64_t start, int64_t vocab_size) {
  return {start, vocab_size - start < kBlock ? vocab_size - start : kBlock};
}

KL_INLINE int64_t whole_pairs(int64_t size) { return (size + kPair - 1) / kPair * kPair; }

template <class T>
KL_INLINE const T* logits_of(const Row& row, int64_t start) {
  return static_cast<const T*>(row.logits) + start;
}

// How far ahead of its loads a loop asks memory for a row: hardware does so by itself, but starts
// anew at every page of 4 KiB, and this makes up for it. Chosen on an AMD EPYC (Zen 3, AVX2), where
// float32 logits from memory then take 4 % less to fold (1 KiB ahead: 3 %, 3 KiB: 4 %), 15 % less
// for a gradient, and bfloat16 and float16, whose loops wait for arithmetic, the same. A page ahead
// is where the loads themselves are looked up in the first-level cache: 5 % more. Into which level
// of the cache made no difference. All lines of the next block at once fill the queue of misses
// while nothing is computed: 5 to 40 % more.
constexpr int64_t kBytesAhead = 2048;

// The same for a block where it lies, which must not reach beyond the row.
template <class T>
KL_INLINE int64_t bytes_ahead(Block block, int64_t vocab_size) {
  const int64_t left = (vocab_size - block.start - block.size) * int64_t(sizeof(T));
  return left < kBytesAhead ? left : kBytesAhead;
}
constexpr int64_t kStagedAhead = 0;  // in the first-level cache already

// Loads a pair, and asks for what lies `ahead` bytes after it.
template <class T>
KL_INLINE Pair load_pair(const T* from, int64_t ahead) {
  constexpr int64_t kLine = 64, kBytes = kPair * sizeof(T);
  for (int64_t i = 0; i < kBytes; i += kLine)
    __builtin_prefetch(reinterpret_cast<const char*>(from) + ahead + i);
  return load_pair(from);
}

template <class T>
KL_INLINE void widen_logits(const Row& row, Block block, float* to) {
  const T* from = logits_of<T>(row, block.start);
  for (int64_t i = 0; i < block.size; ++i) to[i] = to_float(from[i]);
}

struct Staged {
  alignas(64) float values[kBlock];

  // Softcapped logits as floats; what is left of the last pair of vectors holds `padding`, and so
  // does what is skipped.
  void stage(const Row& row, Block block, float padding) {
    if (row.dtype == Dtype::float32) widen_logits<float>(row, block, values);
    if (row.dtype == Dtype::bfloat16) widen_logits<BFloat16>(row, block, values);
    if (row.dtype == Dtype::float16) widen_logits<Float16>(row, block, values);
    const int64_t padded = whole_pairs(block.size);
    for (int64_t i = block.size; i < padded; ++i) values[i] = 0;
    if (row.softcap != 0) {
      for (int64_t i = 0; i < padded; i += kLanes)
        store(values + i, softcapped(load<Floats>(values + i), row.softcap));
    }
    for (int64_t i = block.size; i < padded; ++i) values[i] = padding;
    // Ids that do not ascend are skipped or not, but nothing is written elsewhere.
    const auto within = [&](int64_t id) {
      return id >= block.start && id < block.start + block.size;
    };
    for (int64_t i = first_from(row.skipped_ids, row.n_skipped, block.start);
         i < row.n_skipped && within(row.skipped_ids[i]); ++i)
      values[row.skipped_ids[i] - block.start] = padding;
  }

  // Distance of staged logits from an anchor, in float64 up to the last rounding.
  void measure(Block block, double k, double anchor) {
    for (int64_t i = 0; i < whole_pairs(block.size); ++i)
      values[i] = float(from_anchor(double(values[i]), k, anchor));
  }

  float largest_value(Block block) const {  // after padding with -inf
    Floats most = Floats{} - INFINITY;
    for (int64_t i = 0; i < whole_pairs(block.size); i += kLanes)
      most = largest(load<Floats>(values + i), most);
    float value = -INFINITY;
    for (int i = 0; i < kLanes; ++i) value = most[i] > value ? most[i] : value;
    return value;
  }
};

// The derivative of softcap, from its value.
KL_INLINE float softcap_grad(float value, float softcap) {
  const float ratio = value / softcap, derivative = 1 - ratio * ratio;
  return derivative < 0 ? 0 : derivative;
}

template <class T>
void write_as(const Staged& grad, Block block, void* grad_logits) {
  T* to = static_cast<T*>(grad_logits) + block.start;
  for (int64_t i = 0; i < block.size; ++i) from_float(grad.values[i], to[i]);
}

// A block's staged gradient, through the softcap of the staged logits, into the row grad_logits in
// the dtype of its logits.
inline void write_gradient(const Row& row, const Staged& logits, Staged& grad, Block block,
                           void* grad_logits) {
  if (row.softcap != 0) {
    for (int64_t i = 0; i < block.size; ++i)
      grad.values[i] *= softcap_grad(logits.values[i], row.softcap);
  }
  if (row.dtype == Dtype::float32) write_as<float>(grad, block, grad_logits);
  if (row.dtype == Dtype::bfloat16) write_as<BFloat16>(grad, block, grad_logits);
  if (row.dtype == Dtype::float16) write_as<Float16>(grad, block, grad_logits);
}

KL_INLINE float logit_at(const Row& row, int64_t index) {
  Staged one;
  one.stage({row.logits, row.dtype, row.k, row.softcap}, {index, 1}, 0);  // skipped or not
  return one.values[0];
}

// The token's position from the anchor, the same number the vocabulary loops saw.
KL_INLINE double token_from_anchor(const Row& row, int64_t token, double anchor) {
  return from_anchor(double(logit_at(row, token)), double(row.k), anchor);
}

// Rows whose blocks can be read where they lie; a last block of odd size is staged all the same.
KL_INLINE bool read_in_place(const Row& policy, const Row& reference) {
  const bool has_ref = reference.logits != nullptr;
  return policy.softcap == 0 && policy.n_skipped == 0 &&
         (!has_ref || (reference.softcap == 0 && reference.dtype == policy.dtype));
}

// A logit that lies so far below the anchor that it adds nothing, yet stays finite.
KL_INLINE float far_below(float anchor, float k) { return (anchor - 1000) / k; }

// Where logits lie from the anchor. Guarded, what is -inf lies where its weight is 0, and 0 times
// that is 0.
template <bool kGuarded>
KL_INLINE Floats position(Floats logits, float k, float anchor) {
  constexpr float kWeightless = -1000;
  const Floats t = from_anchor(logits, k, anchor);
  if constexpr (kGuarded) return logits == -INFINITY ? Floats{} + kWeightless : t;
  return t;
}

KL_INLINE bool is_finite(double value) { return value * 0 == 0; }

// A sum and what rounding took from it. Equal weights (a flat row) lose the same part of a unit at
// every addition, and KL is the difference of the logarithms of two such sums; beside one weight
// that is nearly all of a row, all the others of its lane lose theirs.
struct CompensatedSum {
  Floats sum{}, lost{};

  KL_INLINE void add(Floats value) {  // no larger than the sum, but for the first few
    const Floats next = sum + value;
    lost += value - (next - sum);
    sum = next;
  }
  double total() const { return kl_kernels::total(sum) + kl_kernels::total(lost); }
};

}  // namespace
}  // namespace kl_kernels
