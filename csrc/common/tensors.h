// Checks of torch's tensors that every compiled backend makes. Failures reach Python as ValueError.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "dtype.h"

namespace kl_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument(message);
}

inline Dtype dtype_of(const Tensor& logits, const std::string& name) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      throw std::invalid_argument(
          name +
          " has a dtype compiled backends do not take; accepted: float32, bfloat16, float16");
  }
}

inline void check_layout(const Tensor& logits, const std::string& name) {
  check(logits.dim() == 3 && (logits.stride(2) == 1 || logits.size(2) == 1),
        name + " has to be [B, T, V] with stride 1 over V");
  // Work is divided by V.
  check(logits.size(2) >= 1, name + " has to hold at least one logit per row");
}

}  // namespace kl_kernels
