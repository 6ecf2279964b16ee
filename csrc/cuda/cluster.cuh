// The blocks that share a row, and what they find out together. On one block's own account, a
// cluster is that block alone: nothing of sm_90 is needed.
#pragma once

#include "block.cuh"
#include "primitives.cuh"

namespace kl_kernels {

class Cluster {
 public:
  __device__ explicit Cluster(uint32_t n_blocks) : n_blocks_(n_blocks) {}

  __device__ uint32_t n_blocks() const { return n_blocks_; }

  // A barrier of all threads of all blocks in two halves: what comes before everyone's arrival is
  // seen after anyone's wait.
  __device__ __forceinline__ void arrive() const {
    if (n_blocks_ > 1) cluster_arrive();
  }
  // The same where nothing has been written that others will read.
  __device__ __forceinline__ void arrive_relaxed() const {
    if (n_blocks_ > 1) cluster_arrive_relaxed();
  }
  __device__ __forceinline__ void wait() const { n_blocks_ > 1 ? cluster_wait() : __syncthreads(); }

  // The same variable of the block of that rank.
  template <class T>
  __device__ const T& of_rank(const T& shared, uint32_t rank) const {
    return n_blocks_ == 1 ? shared : *static_cast<const T*>(shared_of_rank(&shared, rank));
  }

 private:
  uint32_t n_blocks_;
};

__device__ __forceinline__ double largest_of_warp(double x) {
  for (int by = kWarp / 2; by > 0; by /= 2) {
    const double other = __shfl_xor_sync(kAllLanes, x, by);
    x = x > other ? x : other;
  }
  return x;
}

// The blocks' states merged, the same in every lane of every block: a lane moves one of them to the
// common anchors, all add them in the order of their ranks. By one warp; n_blocks divides 32.
__device__ inline RowState<double> merge_cluster(const Cluster& cluster,
                                                 const RowState<float>& of_block) {
  const uint32_t rank = threadIdx.x % cluster.n_blocks();
  const RowState<double> mine = widened(cluster.of_rank(of_block, rank));
  const double anchor = largest_of_warp(mine.anchor);
  const double ref_anchor = largest_of_warp(mine.ref_anchor);
  const Sums<double> moved = move(mine, anchor, ref_anchor).sums;
  Sums<double> all{};
  for (int i = 0; i < static_cast<int>(cluster.n_blocks()); ++i) {
    all.sx += __shfl_sync(kAllLanes, moved.sx, i);
    all.sy += __shfl_sync(kAllLanes, moved.sy, i);
    all.ex += __shfl_sync(kAllLanes, moved.ex, i);
    all.rk += __shfl_sync(kAllLanes, moved.rk, i);
    all.fk += __shfl_sync(kAllLanes, moved.fk, i);
  }
  return {anchor, ref_anchor, all};
}

}  // namespace kl_kernels
