// Just enough CUDA to run this project's kernels on host threads, one block at a time.
//
// A block's threads are real threads, so that a missing __syncthreads is a data race that
// ThreadSanitizer sees; device memory is host memory, so that AddressSanitizer sees its ends.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <barrier>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __shared__ static  // one block at a time
#define __launch_bounds__(...)

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr int kWarp = 32;

// A warp's shuffles: everyone writes, everyone waits, everyone reads. Two places to write take
// turns: nobody gets to the first again before all have read it.
struct Warp {
  std::barrier<> here{kWarp};
  uint64_t exchange[2][kWarp] = {};
};

struct Block {
  explicit Block(int n_threads) : here(n_threads), flags(n_threads) {
    for (int i = 0; i < n_threads; i += kWarp) warps.push_back(std::make_unique<Warp>());
  }
  std::barrier<> here;
  std::vector<int> flags;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local Block* block;
inline thread_local int turn;

template <class T>
T shuffle(T value, int from_lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Warp& warp = *block->warps[threadIdx.x / kWarp];
  uint64_t* const exchange = warp.exchange[turn ^= 1];
  memcpy(&exchange[threadIdx.x % kWarp], &value, sizeof(T));
  warp.here.arrive_and_wait();
  memcpy(&value, &exchange[from_lane % kWarp], sizeof(T));
  return value;
}

}  // namespace cuda_on_host

inline void __syncthreads() { cuda_on_host::block->here.arrive_and_wait(); }

inline int __syncthreads_or(int flag) {
  cuda_on_host::Block& block = *cuda_on_host::block;
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

template <class... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Parameters... arguments) {
  const int n_threads = static_cast<int>(config->blockDim.x);
  cuda_on_host::Block block(n_threads);
  const auto run = [&](unsigned thread) {
    cuda_on_host::block = &block;
    cuda_on_host::turn = 0;
    threadIdx = dim3(thread);
    blockDim = config->blockDim;
    gridDim = config->gridDim;
    for (unsigned i = 0; i < config->gridDim.x; ++i) {
      blockIdx = dim3(i);
      kernel(arguments...);
      __syncthreads();  // the next block's shared memory is this one's
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < n_threads; ++i) threads.emplace_back(run, i);
  for (std::thread& thread : threads) thread.join();
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
