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

// The blocks' states merged, the same in every lane of every block: a lane moves one of them to the
// common anchors, and they are added in pairs. By one warp; n_blocks is a power of 2.
__device__ inline RowState<double> merge_cluster(const Cluster& cluster,
                                                 const RowState<float>& of_block) {
  const int n = static_cast<int>(cluster.n_blocks());
  const auto other = [](auto value, int by) { return __shfl_xor_sync(kAllLanes, value, by); };
  const RowState<double> mine = widened(cluster.of_rank(of_block, threadIdx.x % n));
  double anchor = mine.anchor, ref_anchor = mine.ref_anchor;
  for (int by = n / 2; by > 0; by /= 2) {
    const double theirs = other(anchor, by), ref_theirs = other(ref_anchor, by);
    anchor = anchor > theirs ? anchor : theirs;
    ref_anchor = ref_anchor > ref_theirs ? ref_anchor : ref_theirs;
  }
  Sums<double> all = move(mine, anchor, ref_anchor).sums;
  // The same in every lane, since x + y is y + x. (Not written +=: the first x may be a product,
  // and fused with its sum it would be rounded in one lane otherwise than in the other.)
  const auto add = [&](double& sum, int by) { sum = __dadd_rn(sum, other(sum, by)); };
  for (int by = n / 2; by > 0; by /= 2) {
    add(all.sx, by);
    add(all.sy, by);
    add(all.ex, by);
    add(all.rk, by);
    add(all.fk, by);
  }
  return {anchor, ref_anchor, all};
}

}  // namespace kl_kernels
