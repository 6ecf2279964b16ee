// Between torch's tensors and the pointers the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <optional>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensor_checks.h"
#include "row.h"

namespace kl_kernels {

// Logits [B, T, V] with stride 1 over V, and the scale their rows are read with.
class Logits {
 public:
  Logits(const Tensor& tensor, const char* name, double temperature, std::optional<double> softcap)
      : data_(static_cast<const char*>(tensor.const_data_ptr())),
        dtype_(dtype_of(tensor, name)),
        element_size_(dtype_ == Dtype::float32 ? 4 : 2),
        k_(float(kLog2e / temperature)),
        softcap_(float(softcap.value_or(0))) {
    check_layout(tensor, name);
    n_batch_ = tensor.size(0);
    n_tokens_ = tensor.size(1);
    vocab_size_ = tensor.size(2);
    batch_stride_ = tensor.stride(0);
    token_stride_ = tensor.stride(1);
  }

  int64_t n_rows() const { return n_batch_ * n_tokens_; }
  int64_t n_batch() const { return n_batch_; }
  int64_t n_tokens() const { return n_tokens_; }
  int64_t vocab_size() const { return vocab_size_; }
  int64_t row_bytes() const { return vocab_size_ * element_size_; }
  bool same_shape(const Logits& other) const {
    return n_batch_ == other.n_batch_ && n_tokens_ == other.n_tokens_ &&
           vocab_size_ == other.vocab_size_;
  }

  Row row(int64_t index) const {
    const int64_t offset = index / n_tokens_ * batch_stride_ + index % n_tokens_ * token_stride_;
    return {data_ + offset * element_size_, dtype_, k_, softcap_};
  }

 private:
  const char* data_;
  Dtype dtype_;
  int64_t element_size_;
  float k_, softcap_;
  int64_t n_batch_, n_tokens_, vocab_size_, batch_stride_, token_stride_;
};

// The data of a contiguous tensor of `numel` elements of `dtype`.
template <class T>
const T* data_of(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
  check(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous(),
        std::string(name) + " has the wrong dtype, size or layout for the cpu backend");
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data_of(const std::optional<Tensor>& tensor, const char* name, ScalarType dtype,
                 int64_t numel) {
  return tensor ? data_of<T>(*tensor, name, dtype, numel) : nullptr;
}

inline float* float_data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Half the time of a backward over a fresh gradient of gigabytes can be page faults; larger pages
// mean fewer of them. Advice only: it may be ignored.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthwhile = 4 << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace kl_kernels
