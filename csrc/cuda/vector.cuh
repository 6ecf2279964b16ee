// 8 neighbouring logits: loading, storing, and to and from float32.
#pragma once

#include "launch.h"

namespace kl_kernels {

// 8 neighbouring logits as they lie in memory.
template <class T>
struct Packed {
  static constexpr int kWords = kLanes * sizeof(T) / 4;
  static constexpr int kVectors = kWords / 4;  // of 16 bytes
  uint32_t words[kWords];

  __device__ __forceinline__ uint4 vector(int i) const {
    const uint32_t* w = words + 4 * i;
    return make_uint4(w[0], w[1], w[2], w[3]);
  }
  __device__ __forceinline__ void set_vector(int i, const uint4& v) {
    uint32_t* w = words + 4 * i;
    w[0] = v.x;
    w[1] = v.y;
    w[2] = v.z;
    w[3] = v.w;
  }
};

constexpr int kAlignment = 16;

// Bytes since the last aligned address.
__device__ inline int misalignment(const void* at) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) % kAlignment);
}
__device__ inline bool is_aligned(const void* at) { return misalignment(at) == 0; }

// Elements from `at` until the next aligned address.
__device__ inline int until_aligned(const void* at, int element_bytes) {
  return (kAlignment - misalignment(at)) % kAlignment / element_bytes;
}

// Cache policy of a loaded line: evicted first, or kept to be read again.
enum class Cache { stream, keep };

// Aligned or not, a lane owns the same logits: with an odd V the alignment of a row depends on its
// place in the batch, and its numbers must not. Narrower loads make up for it.

template <bool kAligned, Cache kCache = Cache::stream, class T>
__device__ __forceinline__ Packed<T> load(const T* at) {
  Packed<T> packed;
  if constexpr (kAligned) {
    const uint4* vectors = reinterpret_cast<const uint4*>(at);
#pragma unroll
    for (int i = 0; i < Packed<T>::kVectors; ++i) {
      // Neither goes past writes of this kernel (ld.global.nc would): a gradient may lie in place.
      packed.set_vector(i, kCache == Cache::stream ? __ldcs(vectors + i) : vectors[i]);
    }
  } else if (sizeof(T) == 4 || reinterpret_cast<uintptr_t>(at) % 4 == 0) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(at);
#pragma unroll
    for (int i = 0; i < Packed<T>::kWords; ++i) packed.words[i] = words[i];
  } else {
    // Three whole words between two halves: five loads, where one by one would be eight.
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(at);
    const uint32_t* words = reinterpret_cast<const uint32_t*>(halves + 1);
    packed.words[0] = halves[0] | words[0] << 16;
    packed.words[1] = words[0] >> 16 | words[1] << 16;
    packed.words[2] = words[1] >> 16 | words[2] << 16;
    packed.words[3] = words[2] >> 16 | static_cast<uint32_t>(halves[7]) << 16;
  }
  return packed;
}

template <class T>
__device__ __forceinline__ void store(T* at, const Packed<T>& packed) {  // aligned
  uint4* vectors = reinterpret_cast<uint4*>(at);
#pragma unroll
  for (int i = 0; i < Packed<T>::kVectors; ++i) __stcs(vectors + i, packed.vector(i));
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }
__device__ __forceinline__ void from_float(float x, __half& to) { to = __float2half(x); }

__device__ __forceinline__ void unpack(const Packed<float>& packed, float (&to)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) to[i] = __uint_as_float(packed.words[i]);
}

// A bfloat16 is the upper half of a float.
__device__ __forceinline__ void unpack(const Packed<__nv_bfloat16>& packed, float (&to)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes / 2; ++i) {
    to[2 * i] = __uint_as_float(packed.words[i] << 16);
    to[2 * i + 1] = __uint_as_float(packed.words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void unpack(const Packed<__half>& packed, float (&to)[kLanes]) {
#pragma unroll
  for (int i = 0; i < kLanes / 2; ++i) {
    const float2 two = __half22float2(reinterpret_cast<const __half2&>(packed.words[i]));
    to[2 * i] = two.x;
    to[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ void pack(const float (&from)[kLanes], Packed<float>& packed) {
#pragma unroll
  for (int i = 0; i < kLanes; ++i) packed.words[i] = __float_as_uint(from[i]);
}

__device__ __forceinline__ void pack(const float (&from)[kLanes], Packed<__nv_bfloat16>& packed) {
#pragma unroll
  for (int i = 0; i < kLanes / 2; ++i) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(from[2 * i], from[2 * i + 1]);
    packed.words[i] = reinterpret_cast<const uint32_t&>(two);
  }
}

__device__ __forceinline__ void pack(const float (&from)[kLanes], Packed<__half>& packed) {
#pragma unroll
  for (int i = 0; i < kLanes / 2; ++i) {
    const __half2 two = __floats2half2_rn(from[2 * i], from[2 * i + 1]);
    packed.words[i] = reinterpret_cast<const uint32_t&>(two);
  }
}

// -inf becomes this, low enough for a weight of 0 and high enough that k x - A stays finite, so
// that 0 times it is 0. (NaN may vanish here: the state of its row has it, too.)
constexpr float kLowest = -0x1p80f;

template <class T>
__device__ __forceinline__ void unpack_finite(const Packed<T>& packed, float (&to)[kLanes]) {
  unpack(packed, to);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) to[i] = fmaxf(to[i], kLowest);
}

// Two at a time: half the instructions.
__device__ __forceinline__ void unpack_finite(const Packed<__nv_bfloat16>& packed,
                                              float (&to)[kLanes]) {
  const __nv_bfloat162 lowest = __float2bfloat162_rn(kLowest);
  Packed<__nv_bfloat16> finite;
#pragma unroll
  for (int i = 0; i < kLanes / 2; ++i) {
    const __nv_bfloat162 two =
        __hmax2(reinterpret_cast<const __nv_bfloat162&>(packed.words[i]), lowest);
    finite.words[i] = reinterpret_cast<const uint32_t&>(two);
  }
  unpack(finite, to);
}

}  // namespace kl_kernels
