// Checks of torch's tensors, and new ones, for every compiled backend. Failures reach Python as
// ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>

#include "dtype.h"
#include "epilogues.h"
#include "parts.h"

namespace kl_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

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
        name + " must be [B, T, V] with stride 1 over V");
  // Work is divided by V.
  check(logits.size(2) >= 1, name + " must hold at least one logit per row");
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() == b.is_cuda() && a.get_device_index() == b.get_device_index();
}

inline void check_like(const Tensor& tensor, const std::string& name, const Tensor& logits) {
  bool same = tensor.dim() == 3 && same_device(tensor, logits);
  for (int64_t i = 0; i < 3; ++i) same = same && tensor.size(i) == logits.size(i);
  check(same, name + " must have the shape and device of logits");
}

inline void check_gradient(const Tensor& tensor, const std::string& name, const Tensor& logits) {
  check_layout(tensor, name);
  check_like(tensor, name, logits);
  check(tensor.scalar_type() == logits.scalar_type(), name + " must have the dtype of logits");
}

inline int64_t n_rows_of(const Tensor& logits) { return logits.size(0) * logits.size(1); }

// The data of a contiguous tensor of `numel` elements on the device of `like`.
template <class T>
const T* data_of(const Tensor& tensor, const std::string& name, ScalarType dtype, int64_t numel,
                 const Tensor& like) {
  check(tensor.scalar_type() == dtype && tensor.numel() == numel && tensor.is_contiguous() &&
            same_device(tensor, like),
        name + " has the wrong dtype, size, layout or device for a compiled backend");
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <class T>
const T* data_of(const OptionalTensor& tensor, const std::string& name, ScalarType dtype,
                 int64_t numel, const Tensor& like) {
  return tensor ? data_of<T>(*tensor, name, dtype, numel, like) : nullptr;
}

// Data of [B, T] tensors that belong to logits; nullptr where there is none.
template <class T>  // Tensor or OptionalTensor
const float* floats_of(const T& tensor, const std::string& name, const Tensor& logits) {
  return data_of<float>(tensor, name, ScalarType::Float, n_rows_of(logits), logits);
}
template <class T>
const int64_t* token_ids_of(const T& token_ids, const Tensor& logits) {
  return data_of<int64_t>(token_ids, "token_ids", ScalarType::Long, n_rows_of(logits), logits);
}
// Bounds of the sequences that are packed in `tokens`, [1, N].
inline const int64_t* cu_seqlens_of(const OptionalTensor& bounds, const Tensor& tokens) {
  if (!bounds) return nullptr;
  check(bounds->dim() == 1 && tokens.dim() == 2 && tokens.size(0) == 1 &&
            bounds->numel() > (tokens.numel() > 0 ? 1 : 0),
        "cu_seqlens must be [S + 1], of tokens [1, N]");
  return data_of<int64_t>(*bounds, "cu_seqlens", ScalarType::Long, bounds->numel(), tokens);
}
inline SkippedIds skipped_ids_of(const Tensor& ids, const Tensor& logits) {
  check(ids.dim() == 3, "skipped_ids must be [B, T, K]");
  return {data_of<int64_t>(ids, "skipped_ids", ScalarType::Long, n_rows_of(logits) * ids.size(2),
                           logits),
          ids.size(2)};
}
template <class T>
const bool* mask_of(const T& mask, const Tensor& logits) {
  return data_of<bool>(mask, "mask", ScalarType::Bool, n_rows_of(logits), logits);
}
inline const float* state_of(const Tensor& state, const std::string& name, const Tensor& logits) {
  return data_of<float>(state, name, ScalarType::Float, 2 * n_rows_of(logits), logits);
}

inline Tensor new_rows(const Tensor& logits) {  // [B, T]
  return torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, ScalarType::Float);
}
inline Tensor new_rows(const Tensor& logits, int64_t n) {  // [n, B, T]
  return torch::stable::new_empty(logits, {n, logits.size(0), logits.size(1)}, ScalarType::Float);
}
inline float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// Gradients here have the dtype of the logits: the token's own entry stands among them.
inline void refuse_own_gradient(const OptionalTensor& own_gradient) {
  check(!own_gradient, "own_gradient is for backends that round gradients to another dtype");
}

// `states` is [parts, fields, B, T].
inline PartStates part_states_of(const Tensor& states, const OptionalTensor& ranges) {
  check(states.dim() == 4 && states.size(0) >= 1 &&
            (states.size(1) == kStateFields || states.size(1) == kStateFieldsWithoutRef),
        "states must be [parts, 9 or 4, B, T]");
  const int64_t n_parts = states.size(0);
  return {data_of<float>(states, "states", ScalarType::Float, states.numel(), states),
          data_of<float>(ranges, "ranges", ScalarType::Float, 2 * n_parts, states), n_parts,
          states.size(2) * states.size(3), states.size(1) == kStateFields};
}
inline Tensor new_rows_of_parts(const Tensor& states) {  // [B, T]
  return torch::stable::new_empty(states, {states.size(2), states.size(3)}, ScalarType::Float);
}
inline Tensor new_states_of_parts(const Tensor& states) {  // [2, B, T]
  return torch::stable::new_empty(states, {2, states.size(2), states.size(3)}, ScalarType::Float);
}

inline PolicyLossParams policy_loss_params(double clip_low, double clip_high,
                                           std::optional<double> dual_clip,
                                           std::optional<double> log_ratio_clamp, double kl_coef,
                                           int64_t kl_estimator, double entropy_coef) {
  return {float(clip_low),
          float(clip_high),
          float(dual_clip.value_or(INFINITY)),
          float(log_ratio_clamp.value_or(INFINITY)),
          float(kl_coef),
          float(entropy_coef),
          Estimator(kl_estimator)};
}

inline RewardParams reward_params(const Tensor& scores, const Tensor& score_index, double kl_coef,
                                  int64_t estimator, std::optional<double> kl_clip,
                                  const Tensor& logits) {
  const int64_t n_batch = logits.size(0);
  return {data_of<float>(scores, "scores", ScalarType::Float, n_batch, logits),
          data_of<int64_t>(score_index, "score_index", ScalarType::Long, n_batch, logits),
          float(kl_coef), Estimator(estimator), float(kl_clip.value_or(INFINITY))};
}

}  // namespace kl_kernels
