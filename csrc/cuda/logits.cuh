// Reading logits and writing gradients, 8 neighbours at a time.
//
// Which lane owns which logits depends on their place in the row alone, not on the row's address:
// with an odd V the alignment of a row depends on its place in the batch, and its numbers must not.
// Rows that are not aligned to 16 bytes are read with narrower loads instead.
#pragma once

#include "launch.h"

namespace kl_kernels {

// 8 neighbouring logits as they lie in memory.
template <class T>
struct Packed {
  static constexpr int kWords = kLanes * sizeof(T) / 4;
  uint32_t words[kWords];
};

constexpr int kAlignment = 16;

__device__ inline bool is_aligned(const void* at) {
  return reinterpret_cast<uintptr_t>(at) % kAlignment == 0;
}

template <bool kAligned, class T>
__device__ __forceinline__ Packed<T> load(const T* at) {
  Packed<T> packed;
  if constexpr (kAligned) {
    const uint4* vectors = reinterpret_cast<const uint4*>(at);
#pragma unroll
    for (int i = 0; i < Packed<T>::kWords / 4; ++i) {
      const uint4 v = __ldcs(vectors + i);  // read once: the first to leave the cache
      packed.words[4 * i] = v.x;
      packed.words[4 * i + 1] = v.y;
      packed.words[4 * i + 2] = v.z;
      packed.words[4 * i + 3] = v.w;
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

template <bool kAligned, class T>
__device__ __forceinline__ void store(T* at, const Packed<T>& packed) {
  if constexpr (kAligned) {
    uint4* vectors = reinterpret_cast<uint4*>(at);
#pragma unroll
    for (int i = 0; i < Packed<T>::kWords / 4; ++i) {
      const uint32_t* w = packed.words + 4 * i;
      __stcs(vectors + i, make_uint4(w[0], w[1], w[2], w[3]));
    }
  } else if (sizeof(T) == 4 || reinterpret_cast<uintptr_t>(at) % 4 == 0) {
    uint32_t* words = reinterpret_cast<uint32_t*>(at);
#pragma unroll
    for (int i = 0; i < Packed<T>::kWords; ++i) words[i] = packed.words[i];
  } else {
    uint16_t* halves = reinterpret_cast<uint16_t*>(at);
    uint32_t* words = reinterpret_cast<uint32_t*>(halves + 1);
    halves[0] = static_cast<uint16_t>(packed.words[0]);
    words[0] = packed.words[0] >> 16 | packed.words[1] << 16;
    words[1] = packed.words[1] >> 16 | packed.words[2] << 16;
    words[2] = packed.words[2] >> 16 | packed.words[3] << 16;
    halves[7] = static_cast<uint16_t>(packed.words[3] >> 16);
  }
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

// Softcap bends finite logits; -inf stays ruled out, +inf stays an error to be seen.
__device__ inline float softcapped(float x, float cap) {
  return isinf(x) ? x : cap * tanhf(x / cap);
}

// The derivative of softcap, from its value; 0 at the ends.
__device__ inline float softcap_grad(float value, float cap) {
  const float ratio = value / cap;
  return fmaxf(1.0f - ratio * ratio, 0.0f);
}

// Stands for a type known at run time only, or for logits with a softcap.
struct Any {};

template <class Policy, class T>
constexpr int kBlocks = Policy::kBlocksPerSm;
template <class Policy>
constexpr int kBlocks<Policy, Any> = Policy::kBlocksPerSmForAny;

// A part of one row of one model's logits, counted from 0.
template <class T>
class Row {
 public:
  using Eight = Packed<T>;

  __device__ Row(const Logits& logits, int64_t offset)
      : at_(static_cast<const T*>(logits.data) + offset) {}

  __device__ bool aligned() const { return is_aligned(at_); }
  __device__ float operator[](int64_t i) const { return to_float(at_[i]); }
  template <bool kAligned>
  __device__ __forceinline__ Eight eight(int i) const {
    return load<kAligned>(at_ + i);
  }

 private:
  const T* at_;
};

template <>
class Row<Any> {
 public:
  using Eight = Packed<float>;

  __device__ Row(const Logits& logits, int64_t offset)
      : at_(logits.data), offset_(offset), dtype_(logits.dtype), softcap_(logits.softcap) {}

  __device__ bool aligned() const {
    return is_aligned(static_cast<const char*>(at_) + offset_ * (dtype_ == Dtype::float32 ? 4 : 2));
  }

  __device__ float operator[](int64_t i) const {
    return dtype_ == Dtype::float32    ? one<float>(i)
           : dtype_ == Dtype::bfloat16 ? one<__nv_bfloat16>(i)
                                       : one<__half>(i);
  }

  template <bool kAligned>
  __device__ __forceinline__ Eight eight(int i) const {
    float x[kLanes];
    if (dtype_ == Dtype::float32) unpack(load<kAligned>(as<float>() + i), x);
    if (dtype_ == Dtype::bfloat16) unpack(load<kAligned>(as<__nv_bfloat16>() + i), x);
    if (dtype_ == Dtype::float16) unpack(load<kAligned>(as<__half>() + i), x);
    if (softcap_ != 0) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) x[j] = softcapped(x[j], softcap_);
    }
    Eight packed;
    pack(x, packed);
    return packed;
  }

 private:
  template <class T>
  __device__ const T* as() const {
    return static_cast<const T*>(at_) + offset_;
  }
  template <class T>
  __device__ float one(int64_t i) const {
    const float x = to_float(as<T>()[i]);
    return softcap_ == 0 ? x : softcapped(x, softcap_);
  }

  const void* at_;
  int64_t offset_;
  Dtype dtype_;
  float softcap_;
};

// Writes one part of a row of grad_logits, in the policy's element type.
template <class T>
class GradRow {
 public:
  __device__ GradRow(void* grad_logits, const Logits&, int64_t offset)
      : at_(static_cast<T*>(grad_logits) + offset) {}

  __device__ bool aligned() const { return is_aligned(at_); }
  __device__ __forceinline__ void put(int64_t i, float grad, float) const {
    from_float(grad, at_[i]);
  }
  template <bool kAligned>
  __device__ __forceinline__ void put_eight(int i, float (&grad)[kLanes], const float (&)[kLanes]) const {
    Packed<T> packed;
    pack(grad, packed);
    store<kAligned>(at_ + i, packed);
  }

 private:
  T* at_;
};

template <>
class GradRow<Any> {
 public:
  __device__ GradRow(void* grad_logits, const Logits& policy, int64_t offset)
      : at_(grad_logits), offset_(offset), dtype_(policy.dtype), softcap_(policy.softcap) {}

  __device__ bool aligned() const {
    return is_aligned(static_cast<char*>(at_) + offset_ * (dtype_ == Dtype::float32 ? 4 : 2));
  }

  __device__ void put(int64_t i, float grad, float value) const {
    if (softcap_ != 0) grad *= softcap_grad(value, softcap_);
    if (dtype_ == Dtype::float32) as<float>().put(i, grad, value);
    if (dtype_ == Dtype::bfloat16) as<__nv_bfloat16>().put(i, grad, value);
    if (dtype_ == Dtype::float16) as<__half>().put(i, grad, value);
  }

  // `value` is the softcapped logit.
  template <bool kAligned>
  __device__ void put_eight(int i, float (&grad)[kLanes], const float (&value)[kLanes]) const {
    if (softcap_ != 0) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) grad[j] *= softcap_grad(value[j], softcap_);
    }
    if (dtype_ == Dtype::float32) as<float>().template put_eight<kAligned>(i, grad, value);
    if (dtype_ == Dtype::bfloat16)
      as<__nv_bfloat16>().template put_eight<kAligned>(i, grad, value);
    if (dtype_ == Dtype::float16) as<__half>().template put_eight<kAligned>(i, grad, value);
  }

 private:
  template <class T>
  __device__ GradRow<T> as() const {
    return GradRow<T>(at_, Logits{}, offset_);
  }

  void* at_;
  int64_t offset_;
  Dtype dtype_;
  float softcap_;
};

// Calls `use(T{})` with the element type to read both models' logits as. Types that differ and
// softcaps share one kernel: rare enough not to be worth nine.
template <class Use>
cudaError_t with_element_type(const Logits& policy, const Logits& reference, const Use& use) {
  const bool alone = reference.data == nullptr;
  const bool plain = policy.softcap == 0 && (alone || (reference.softcap == 0 &&
                                                       reference.dtype == policy.dtype));
  if (!plain) return use(Any{});
  if (policy.dtype == Dtype::float32) return use(float{});
  if (policy.dtype == Dtype::bfloat16) return use(__nv_bfloat16{});
  return use(__half{});
}

}  // namespace kl_kernels
