// Between torch's tensors and the pointers, device and stream the kernels take.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../common/tensors.h"
#include "operators.h"

namespace kl_kernels {

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

inline Models models_of(const Tensor& logits, const OptionalTensor& ref_logits, double temperature,
                        double ref_temperature, std::optional<double> softcap,
                        std::optional<double> ref_softcap) {
  Models models{logits_of(logits, "logits", temperature, softcap), {}};
  if (ref_logits) {
    models.reference = logits_of(*ref_logits, "ref_logits", ref_temperature, ref_softcap);
    check_like(*ref_logits, "ref_logits", logits);
  }
  return models;
}

// Without `token_ids` none is sampled.
template <class Mask>  // Tensor or OptionalTensor
Rows rows_of(const Tensor& logits, const OptionalTensor& token_ids, const Mask& mask) {
  return {n_rows_of(logits), logits.size(1), logits.size(2), token_ids_of(token_ids, logits),
          mask_of(mask, logits)};
}

inline GradLogits grad_logits_of(const Tensor& tensor, const std::string& name,
                                 const Tensor& logits) {
  check_gradient(tensor, name, logits);
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1)};
}

}  // namespace kl_kernels
