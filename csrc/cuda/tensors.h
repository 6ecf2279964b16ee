// Between torch's tensors and the pointers, device and stream the kernels take.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../common/tensor_checks.h"
#include "operators.h"

namespace kl_kernels {

using OptionalTensor = std::optional<Tensor>;

inline void check(cudaError_t error) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes the device of a tensor current, for torch and for our own (static) CUDA runtime, and knows
// torch's stream there.
class Device {
 public:
  explicit Device(const Tensor& on) : guard_(on.get_device_index()) {
    check(cudaSetDevice(on.get_device_index()));
    void* stream = nullptr;
    if (get_stream()(on.get_device_index(), &stream) != 0)
      throw std::runtime_error("torch does not tell its current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  // Found in the libtorch_cuda that is already there, and only when it is needed: linked against
  // it, this library would not load beside a torch without CUDA.
  static decltype(&aoti_torch_get_current_cuda_stream) get_stream() {
    static void* const symbol = [] {
      void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
      return dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    }();
    if (symbol == nullptr) throw std::runtime_error("this torch is built without CUDA");
    return reinterpret_cast<decltype(&aoti_torch_get_current_cuda_stream)>(symbol);
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline void check_like(const Tensor& tensor, const std::string& name, const Tensor& logits) {
  bool same = tensor.is_cuda() && tensor.get_device_index() == logits.get_device_index();
  for (int64_t i = 0; i < 3; ++i) same = same && tensor.size(i) == logits.size(i);
  check(same, name + " has to have the shape and device of logits");
}

inline Logits logits_of(const Tensor& tensor, const std::string& name, double temperature,
                        std::optional<double> softcap) {
  check_layout(tensor, name);
  return {tensor.const_data_ptr(),
          dtype_of(tensor, name),
          tensor.stride(0),
          tensor.stride(1),
          static_cast<float>(kLog2e / temperature),
          static_cast<float>(softcap.value_or(0))};
}

// `like` has the shape, dtype and device.
inline GradLogits grad_logits_of(const Tensor& tensor, const std::string& name,
                                 const Tensor& like) {
  check_layout(tensor, name);
  check_like(tensor, name, like);
  check(tensor.scalar_type() == like.scalar_type(), name + " has to have the dtype of logits");
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

// The data of a contiguous tensor of `numel` elements on the device of `like`.
template <class T>
const T* data_of(const Tensor& tensor, const std::string& name, ScalarType dtype, int64_t numel,
                 const Tensor& like) {
  check(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous() &&
            tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(),
        name + " has the wrong dtype, size, layout or device for the cuda backend");
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data_of(const OptionalTensor& tensor, const std::string& name, ScalarType dtype,
                 int64_t numel, const Tensor& like) {
  return tensor ? data_of<T>(*tensor, name, dtype, numel, like) : nullptr;
}

}  // namespace kl_kernels
