// Instructions that CUDA C++ has no name for. tests/backends/host provides the same functions.
#pragma once

#include "runtime.h"

#if !defined(KL_CUDA_ON_HOST)

namespace kl_kernels {

// The larger one, or NaN if either is NaN: fmaxf drops it.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The dynamic shared memory of this block, aligned to 16 bytes.
__device__ __forceinline__ void* dynamic_shared_memory() {
  extern __shared__ uint4 dynamic_memory[];
  return dynamic_memory;
}

// Begins to copy 16 bytes from global to shared memory, both aligned, past the L1 cache.
__device__ __forceinline__ void copy_async(void* to, const void* from) {
  const unsigned shared = static_cast<unsigned>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

// Ends a group of this thread's copies.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits for all of this thread's groups but the last kPending.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Blocks of a cluster; before sm_90 there is none, and nobody calls these. (Code of compute_80 that
// the driver compiles for a newer GPU stops here instead of giving wrong numbers.)
__device__ __forceinline__ void cluster_arrive() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive();
#else
  __trap();
#endif
}
// Orders no memory accesses, and does not wait for any (membar.gpu).
__device__ __forceinline__ void cluster_arrive_relaxed() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_arrive_relaxed();
#else
  __trap();
#endif
}
__device__ __forceinline__ void cluster_wait() {
#if __CUDA_ARCH__ >= 900
  __cluster_barrier_wait();
#else
  __trap();
#endif
}
// Where the block of that rank has what this block has at `shared`.
__device__ __forceinline__ const void* shared_of_rank(const void* shared, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  return __cluster_map_shared_rank(shared, rank);
#else
  __trap();
  return shared;
#endif
}

}  // namespace kl_kernels

#endif
