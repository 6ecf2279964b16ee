// One part of a row of one model's logits, or of their gradient, in a type that is known to the
// compiler or in Any.
#pragma once

#include "vector.cuh"

namespace kl_kernels {

// Softcap bends finite logits; -inf stays ruled out, +inf stays an error to be seen.
__device__ inline float softcapped(float x, float cap) {
  return isinf(x) ? x : cap * tanhf(x / cap);
}

// The derivative of softcap, from its value; 0 at the ends.
__device__ inline float softcap_grad(float value, float cap) {
  const float ratio = value / cap;
  return fmaxf(1.0f - ratio * ratio, 0.0f);
}

__device__ inline int bytes_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Stands for a type known at run time only, or for logits with a softcap.
struct Any {};

template <class Policy, class T>
constexpr int kBlocks = Policy::kBlocksPerSm;
template <class Policy>
constexpr int kBlocks<Policy, Any> = Policy::kBlocksPerSmForAny;

// A part of one row of one model's logits, counted from 0.
template <class T, Cache kCache = Cache::stream>
class Row {
 public:
  using Element = T;
  using Vector = Packed<T>;

  __device__ Row(const Logits& logits, int64_t offset)
      : at_(static_cast<const T*>(logits.data) + offset) {}

  __device__ bool aligned(int i) const { return is_aligned(at_ + i); }
  __device__ const T* at(int i) const { return at_ + i; }
  __device__ float operator[](int64_t i) const { return to_float(at_[i]); }
  template <bool kAligned>
  __device__ __forceinline__ Vector vector_at(int i) const {
    return load<kAligned, kCache>(at_ + i);
  }

 private:
  const T* at_;
};

// Converts at first use, not at the load: converting at the load would stall on it.
template <>
struct Packed<Any> {
  uint32_t words[kLanes];  // of 16-bit types the first half
  Dtype dtype;
  float softcap;

  template <class T>
  __device__ __forceinline__ void set(const Packed<T>& packed) {
#pragma unroll
    for (int i = 0; i < Packed<T>::kWords; ++i) words[i] = packed.words[i];
  }
  template <class T>
  __device__ __forceinline__ Packed<T> as() const {
    Packed<T> packed;
#pragma unroll
    for (int i = 0; i < Packed<T>::kWords; ++i) packed.words[i] = words[i];
    return packed;
  }
};

__device__ __forceinline__ void unpack(const Packed<Any>& packed, float (&to)[kLanes]) {
  if (packed.dtype == Dtype::float32) unpack(packed.as<float>(), to);
  if (packed.dtype == Dtype::bfloat16) unpack(packed.as<__nv_bfloat16>(), to);
  if (packed.dtype == Dtype::float16) unpack(packed.as<__half>(), to);
  if (packed.softcap == 0) return;
#pragma unroll
  for (int i = 0; i < kLanes; ++i) to[i] = softcapped(to[i], packed.softcap);
}
__device__ __forceinline__ void unpack_finite(const Packed<Any>& packed, float (&to)[kLanes]) {
  unpack(packed, to);
#pragma unroll
  for (int i = 0; i < kLanes; ++i) to[i] = fmaxf(to[i], kLowest);
}

template <Cache kCache>
class Row<Any, kCache> {
 public:
  using Element = Any;
  using Vector = Packed<Any>;

  __device__ Row(const Logits& logits, int64_t offset)
      : at_(logits.data), offset_(offset), dtype_(logits.dtype), softcap_(logits.softcap) {}

  __device__ bool aligned(int i) const {
    const int bytes = bytes_of(dtype_);
    return is_aligned(static_cast<const char*>(at_) + (offset_ + i) * bytes);
  }

  __device__ float operator[](int64_t i) const {
    return dtype_ == Dtype::float32    ? one<float>(i)
           : dtype_ == Dtype::bfloat16 ? one<__nv_bfloat16>(i)
                                       : one<__half>(i);
  }

  template <bool kAligned>
  __device__ __forceinline__ Vector vector_at(int i) const {
    Vector packed{{}, dtype_, softcap_};
    if (dtype_ == Dtype::float32)
      packed.set(load<kAligned, kCache>(as<float>() + i));
    else  // one 16-bit type is loaded like the other
      packed.set(load<kAligned, kCache>(as<__half>() + i));
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

  __device__ int until_aligned() const { return kl_kernels::until_aligned(at_, sizeof(T)); }
  __device__ __forceinline__ void put(int64_t i, float grad, float) const {
    from_float(grad, at_[i]);
  }
  // The first of them aligned.
  __device__ __forceinline__ void put_vector(int i, float (&grad)[kLanes],
                                             const float (&)[kLanes]) const {
    Packed<T> packed;
    pack(grad, packed);
    store(at_ + i, packed);
  }

 private:
  T* at_;
};

template <>
class GradRow<Any> {
 public:
  __device__ GradRow(void* grad_logits, const Logits& policy, int64_t offset)
      : at_(grad_logits), offset_(offset), dtype_(policy.dtype), softcap_(policy.softcap) {}

  __device__ int until_aligned() const {
    const int bytes = bytes_of(dtype_);
    return kl_kernels::until_aligned(static_cast<char*>(at_) + offset_ * bytes, bytes);
  }

  __device__ void put(int64_t i, float grad, float value) const {
    if (softcap_ != 0) grad *= softcap_grad(value, softcap_);
    if (dtype_ == Dtype::float32) as<float>().put(i, grad, value);
    if (dtype_ == Dtype::bfloat16) as<__nv_bfloat16>().put(i, grad, value);
    if (dtype_ == Dtype::float16) as<__half>().put(i, grad, value);
  }

  // `value` is the softcapped logit.
  __device__ void put_vector(int i, float (&grad)[kLanes], const float (&value)[kLanes]) const {
    if (softcap_ != 0) {
#pragma unroll
      for (int j = 0; j < kLanes; ++j) grad[j] *= softcap_grad(value[j], softcap_);
    }
    if (dtype_ == Dtype::float32) as<float>().put_vector(i, grad, value);
    if (dtype_ == Dtype::bfloat16) as<__nv_bfloat16>().put_vector(i, grad, value);
    if (dtype_ == Dtype::float16) as<__half>().put_vector(i, grad, value);
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
  const bool has_ref = reference.data != nullptr;
  const bool plain = policy.softcap == 0 &&
                     (!has_ref || (reference.softcap == 0 && reference.dtype == policy.dtype));
  if (!plain) return use(Any{});
  if (policy.dtype == Dtype::float32) return use(float{});
  if (policy.dtype == Dtype::bfloat16) return use(__nv_bfloat16{});
  return use(__half{});
}

}  // namespace kl_kernels
