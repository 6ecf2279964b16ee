// fold_tail: the state of each row without some of its tokens.
//
// What is skipped is ruled out as soon as it is loaded: there is no copy to plant -inf in, and
// nothing to subtract from a sum of all, which would leave rounding where they are most of it.
#pragma once

#include "forward.cuh"

namespace kl_kernels {

// The guarded loop alone: it takes -inf as it is meant.
template <class Policy>
struct Guarded : Policy {
  static constexpr bool kFastLoop = false;
};

// 8 logits, and a bit for each that is skipped.
template <class Vector>
struct WithoutSome {
  Vector logits;
  uint32_t skipped;
};

template <class Vector>
__device__ __forceinline__ void unpack(const WithoutSome<Vector>& packed, float (&to)[kLanes]) {
  unpack(packed.logits, to);
#pragma unroll
  for (int j = 0; j < kLanes; ++j) to[j] = packed.skipped >> j & 1 ? -INFINITY : to[j];
}

// A part of a row, its ids looked up 8 logits at a time: log2 K steps and one for each that is
// found, beside 8 times 13 instructions.
template <class R>
class TailRow {
 public:
  using Element = typename R::Element;
  using Vector = WithoutSome<typename R::Vector>;

  __device__ TailRow(const R& row, const int64_t* ids, int64_t n_ids, int64_t begin)
      : row_(row), ids_(ids), n_ids_(n_ids), begin_(begin) {}

  __device__ bool aligned(int i) const { return row_.aligned(i); }
  __device__ float operator[](int64_t i) const { return skipped(i, 1) != 0 ? -INFINITY : row_[i]; }
  template <bool kAligned>
  __device__ __forceinline__ Vector vector_at(int i) const {
    return {row_.template vector_at<kAligned>(i), skipped(i, kLanes)};
  }

 private:
  __device__ uint32_t skipped(int64_t i, int n) const {
    const int64_t first = begin_ + i;
    uint32_t bits = 0;
    for (int64_t j = first_from(ids_, n_ids_, first); j < n_ids_ && ids_[j] < first + n; ++j)
      bits |= 1u << (ids_[j] - first);
    return bits;
  }

  R row_;
  const int64_t* ids_;
  int64_t n_ids_, begin_;
};

template <class Policy, class T>
__global__ void __launch_bounds__(Policy::kThreads, kBlocks<Policy, T>)
    tail_kernel(Rows rows, Split split, Logits policy, SkippedIds skipped, Outputs out,
                RowState<float>* parts) {  // as fold_kernel's
  __shared__ WarpScratch<Policy::kThreads> scratch_of_warps;
  const SplitOfRow place = split_of_row(blockIdx.x, rows, split);
  const uint32_t row = place.row;
  if (!counts(rows, row)) {  // the whole block returns
    if (parts == nullptr && threadIdx.x == 0) write_masked(rows, false, out, RewardParams{}, row);
    return;
  }
  const auto all = part_of<Row<T>, false>(rows, policy, policy, place);
  const TailRow<Row<T>> x(all.x, skipped.of(row), skipped.per_row, place.begin);
  const Part<TailRow<Row<T>>, false> part{x, x, all.span, all.kx, all.ky};
  const auto probe_end = [&] { return token_extent<Policy>(part, -INFINITY, -INFINITY); };
  const RowState<float> s =
      all.aligned() ? fold_part<Policy, true, false>(part, probe_end, scratch_of_warps)
                    : fold_part<Policy, false, false>(part, probe_end, scratch_of_warps);
  if (threadIdx.x != 0) return;
  if (parts == nullptr)
    write_finished(rows, policy, Logits{}, out, RewardParams{}, row, widened(s));
  else
    parts[blockIdx.x] = s;
}

template <class Policy>
cudaError_t launch_tail(const Rows& rows, const Logits& policy, const SkippedIds& skipped,
                        const Outputs& out, void* scratch, cudaStream_t stream) {
  const Split split = split_of<Policy>(rows.vocab_size);
  RowState<float>* const parts =
      split.n_parts == 1 ? nullptr : static_cast<RowState<float>*>(scratch);
  const cudaError_t error = with_element_type(policy, Logits{}, [&](auto element) {
    return launch(tail_kernel<Guarded<Policy>, decltype(element)>,
                  {rows.n_rows * split.n_parts, Policy::kThreads}, stream, rows, split, policy,
                  skipped, out, parts);
  });
  if (error != cudaSuccess || parts == nullptr) return error;
  return launch_finish(rows, split, policy, Logits{}, out, RewardParams{}, parts, stream);
}

}  // namespace kl_kernels
