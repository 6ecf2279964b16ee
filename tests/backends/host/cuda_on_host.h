// Just enough CUDA to run this project's kernels on host threads, one cluster at a time.
//
// The threads of a cluster's blocks are threads (threads.h), so that a missing barrier is a data
// race that ThreadSanitizer sees; device memory is host memory, so that AddressSanitizer sees its
// ends. Asynchronous copies are made when they are waited for, and a block's dynamic shared memory
// is gone when the block is: what is read too early or too late is NaN, and a race.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "threads.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // not for kernels whose blocks run side by side, in clusters
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributeNonPortableClusterSizeAllowed,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrClusterLaunch,
  kDeviceAttributes,
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct float2 {
  float x, y;
};

inline dim3 blockDim, gridDim;
#define threadIdx (cuda_on_host::self->thread_index)
#define blockIdx (cuda_on_host::self->block_index)

namespace cuda_on_host {

constexpr int kWarp = 32;

// A warp's shuffles: everyone writes, everyone waits, everyone reads. Two places to write take
// turns: no thread gets to the first again before all have read it.
struct Warp {
  Barrier here{kWarp};
  uint64_t exchange[2][kWarp] = {};
};

struct Cluster;

struct alignas(16) Vector {
  char bytes[16];
};

struct Block {
  Block(int n_threads, size_t shared_bytes, Cluster& cluster)
      : cluster(cluster), here(n_threads), flags(n_threads), shared((shared_bytes + 15) / 16) {
    for (int i = 0; i < n_threads; i += kWarp) warps.push_back(std::make_unique<Warp>());
  }
  void forget_shared() { std::fill(shared.begin(), shared.end(), kGarbage); }

  Cluster& cluster;
  Barrier here;
  std::vector<int> flags;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<Vector> shared;  // dynamic

 private:
  static constexpr Vector kGarbage = [] {
    Vector vector{};
    for (char& byte : vector.bytes) byte = -1;  // NaN
    return vector;
  }();
};

struct Cluster {
  Cluster(int n_blocks, int n_threads, size_t shared_bytes) : here(n_blocks * n_threads) {
    for (int i = 0; i < n_blocks; ++i)
      blocks.push_back(std::make_unique<Block>(n_threads, shared_bytes, *this));
  }
  // A block's memory was read after so many arrivals of the reader: no block may leave before all
  // have arrived once more.
  void read_after(int n_arrivals) {
    int known = needed_waits;
    while (known <= n_arrivals && !needed_waits.compare_exchange_weak(known, n_arrivals + 1)) {
    }
  }
  void check_leave(int n_waits) const {
    if (n_waits >= needed_waits) return;
    fprintf(stderr, "a block left its cluster while others may have been reading its memory\n");
    abort();
  }

  Barrier here;
  std::vector<std::unique_ptr<Block>> blocks;
  std::atomic<int> needed_waits = 0;
};

struct Copy {
  void* to;
  const void* from;
};

struct Thread {
  dim3 thread_index, block_index;
  Block& block;
  int turn = 0, n_arrivals = 0, n_waits = 0;
  std::optional<Barrier::arrival_token> arrived = {};
  std::vector<Copy> copies = {};               // since the last commit
  std::vector<std::vector<Copy>> groups = {};  // committed, not yet waited for
};

// Answers of cudaDeviceGetAttribute; tests change them.
inline int device_attributes[kDeviceAttributes];
inline int sms_per_group;  // a cluster's blocks run in one of these
inline int blocks_of_last_cluster;
// Limits set by cudaFuncSetAttribute.
inline std::map<const void*, std::map<cudaFuncAttribute, int>> allowed;

inline int clusters_per_group(int shared_bytes, int n_blocks) {
  const int of_block = shared_bytes + device_attributes[cudaDevAttrReservedSharedMemoryPerBlock];
  const int of_sm = device_attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor];
  return of_sm / of_block * sms_per_group / n_blocks;
}

template <class T>
T shuffle(T value, int from_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = *self->block.warps[threadIdx.x / kWarp];
  uint64_t* const exchange = warp.exchange[self->turn ^= 1];
  memcpy(&exchange[threadIdx.x % kWarp], &value, sizeof(T));
  warp.here.arrive_and_wait();
  memcpy(&value, &exchange[from_lane % kWarp], sizeof(T));
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::self->block.here.arrive_and_wait(); }

inline int __syncthreads_or(int flag) {
  cuda_on_host::Block& block = cuda_on_host::self->block;
  block.flags[threadIdx.x] = flag;
  __syncthreads();
  int any = 0;
  for (int other : block.flags) any |= other != 0;
  __syncthreads();
  return any;
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return cuda_on_host::shuffle(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int by) {
  return cuda_on_host::shuffle(value, static_cast<int>(threadIdx.x) ^ by);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int by) {
  const int lane = threadIdx.x % cuda_on_host::kWarp;
  return cuda_on_host::shuffle(value, lane + by < cuda_on_host::kWarp ? lane + by : lane);
}

inline double __dadd_rn(double x, double y) { return x + y; }

namespace kl_kernels {  // primitives.cuh

inline float max_or_nan(float a, float b) { return isnan(a) || isnan(b) ? NAN : fmaxf(a, b); }

inline void* dynamic_shared_memory() { return cuda_on_host::self->block.shared.data(); }

inline void copy_async(void* to, const void* from) {
  for (const void* at : {static_cast<const void*>(to), from})
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) __builtin_trap();
  cuda_on_host::self->copies.push_back({to, from});
}
inline void commit_copies() {
  cuda_on_host::Thread& thread = *cuda_on_host::self;
  thread.groups.push_back(std::move(thread.copies));
  thread.copies.clear();
}
template <int kPending>
void wait_for_copies() {
  auto& groups = cuda_on_host::self->groups;
  while (groups.size() > kPending) {
    for (const auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}

inline void cluster_arrive() {
  cuda_on_host::Thread& thread = *cuda_on_host::self;
  ++thread.n_arrivals;
  thread.arrived = thread.block.cluster.here.arrive();
}
inline void cluster_arrive_relaxed() { cluster_arrive(); }
inline void cluster_wait() {
  cuda_on_host::Thread& thread = *cuda_on_host::self;
  thread.block.cluster.here.wait(std::move(*thread.arrived));
  ++thread.n_waits;
}
inline const void* shared_of_rank(const void* shared, uint32_t rank) {
  cuda_on_host::Block& mine = cuda_on_host::self->block;
  mine.cluster.read_after(cuda_on_host::self->n_arrivals);
  const ptrdiff_t offset =
      static_cast<const char*>(shared) - reinterpret_cast<const char*>(mine.shared.data());
  return reinterpret_cast<const char*>(mine.cluster.blocks[rank]->shared.data()) + offset;
}

}  // namespace kl_kernels

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = cuda_on_host::device_attributes[attribute];
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute what, int value) {
  cuda_on_host::allowed[kernel][what] = value;
  return cudaSuccess;
}
inline cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void* kernel,
                                                  const cudaLaunchConfig_t* config) {
  auto& allowed = cuda_on_host::allowed[kernel];
  const int bytes = static_cast<int>(config->dynamicSmemBytes);
  const int n_blocks = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  if (bytes > allowed[cudaFuncAttributeMaxDynamicSharedMemorySize] || n_blocks > 16 ||
      (n_blocks > 8 && !allowed[cudaFuncAttributeNonPortableClusterSizeAllowed]))
    return cudaErrorInvalidConfiguration;
  *n = 8 * cuda_on_host::clusters_per_group(bytes, n_blocks);
  return cudaSuccess;
}

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const int n_threads = static_cast<int>(config->blockDim.x);
  const unsigned n_blocks = config->numAttrs == 0 ? 1 : config->attrs[0].val.clusterDim.x;
  int at_once = 1;
  if (n_blocks > 1 || config->dynamicSmemBytes > 0) {
    const cudaError_t error =
        cudaOccupancyMaxActiveClusters(&at_once, reinterpret_cast<const void*>(kernel), config);
    if (error != cudaSuccess) return error;
  }
  if (config->gridDim.x % n_blocks != 0 || at_once == 0) return cudaErrorInvalidConfiguration;
  cuda_on_host::blocks_of_last_cluster = static_cast<int>(n_blocks);
  cuda_on_host::Cluster cluster(n_blocks, n_threads, config->dynamicSmemBytes);
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  cuda_on_host::run_together(n_blocks * n_threads, [&](int index) {
    const unsigned rank = index / n_threads, thread = index % n_threads;
    cuda_on_host::Block& block = *cluster.blocks[rank];
    cuda_on_host::Thread me{thread, {}, block};
    cuda_on_host::self = &me;
    for (unsigned i = rank; i < config->gridDim.x; i += n_blocks) {
      blockIdx = dim3(i);
      me.n_arrivals = me.n_waits = 0;
      if (thread == 0) block.forget_shared();
      __syncthreads();
      kernel(arguments...);
      __syncthreads();  // the next block's shared memory is this one's
      if (thread == 0) block.forget_shared();
      cluster.here.arrive_and_wait();
      cluster.check_leave(me.n_waits);
      cluster.here.arrive_and_wait();  // a cluster starts together
      if (rank == 0 && thread == 0) cluster.needed_waits = 0;
    }
  });
  return cudaSuccess;
}

// Loads and stores with a cache hint. Like the hardware, they insist on alignment.
template <class T>
T __ldcs(const T* at) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) __builtin_trap();
  T value;
  memcpy(&value, at, sizeof(T));
  return value;
}
template <class T>
void __stcs(T* at, T value) {
  if (reinterpret_cast<uintptr_t>(at) % sizeof(T) != 0) __builtin_trap();
  memcpy(at, &value, sizeof(T));
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>(((uint64_t{high} << 32) | low) >> by % 32);
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
using __half = _Float16;
struct __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  if (isnan(x)) return {0x7fff};
  const uint32_t bits = __float_as_uint(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16(x), __float2bfloat16(y)};
}
inline __nv_bfloat162 __float2bfloat162_rn(float x) { return __floats2bfloat162_rn(x, x); }
inline __nv_bfloat162 __hmax2(__nv_bfloat162 s, __nv_bfloat162 t) {
  return __floats2bfloat162_rn(fmaxf(__bfloat162float(s.x), __bfloat162float(t.x)),
                               fmaxf(__bfloat162float(s.y), __bfloat162float(t.y)));
}
inline float __half2float(__half x) { return static_cast<float>(x); }
inline __half __float2half(float x) { return static_cast<__half>(x); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half(x), __float2half(y)}; }
