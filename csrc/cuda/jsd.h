// token_jsd and what belongs to it: checks, allocation, device and stream.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "tensors.h"

namespace kl_kernels {

// Both models' logits, of which no token is sampled.
struct MixtureTensors {
  Logits policy, reference;
  Rows rows;

  MixtureTensors(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask,
                 double temperature, double ref_temperature, std::optional<double> softcap,
                 std::optional<double> ref_softcap)
      : policy(logits_of(logits, "logits", temperature, softcap)),
        reference(logits_of(ref_logits, "ref_logits", ref_temperature, ref_softcap)) {
    check_like(ref_logits, "ref_logits", logits);
    const int64_t n_rows = logits.size(0) * logits.size(1);
    rows = {n_rows, logits.size(1), logits.size(2), nullptr,
            data_of<bool>(mask, "mask", ScalarType::Bool, n_rows, logits)};
  }
};

inline Tensor new_rows(const Tensor& logits, int64_t n) {  // [n, B, T]
  return torch::stable::new_empty(logits, {n, logits.size(0), logits.size(1)}, ScalarType::Float);
}
inline Tensor new_rows(const Tensor& logits) {  // [B, T]
  return torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, ScalarType::Float);
}
inline float* floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

inline FinishedRows finished_rows(const Tensor& policy_state, const Tensor& ref_state, double beta,
                                  const Tensor& logits) {
  const int64_t n = 2 * logits.size(0) * logits.size(1);
  return {data_of<float>(policy_state, "policy_state", ScalarType::Float, n, logits),
          data_of<float>(ref_state, "ref_state", ScalarType::Float, n, logits), beta};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> token_jsd(
    const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask, double beta,
    double temperature, double ref_temperature, std::optional<double> softcap,
    std::optional<double> ref_softcap) {
  const MixtureTensors of(logits, ref_logits, mask, temperature, ref_temperature, softcap,
                          ref_softcap);
  Tensor jsd = new_rows(logits), mixture_kl = new_rows(logits);
  Tensor policy_state = new_rows(logits, 2), ref_state = new_rows(logits, 2);
  Outputs states{};
  states.policy_state = floats(policy_state);
  states.ref_state = floats(ref_state);
  const Device device(logits);
  const int64_t folds = scratch_bytes(of.rows), mixes = mix_scratch_bytes(of.rows);
  const Tensor scratch =
      torch::stable::new_empty(logits, {folds > mixes ? folds : mixes}, ScalarType::Byte);
  void* const memory = scratch.mutable_data_ptr();
  check(forward(of.rows, of.policy, of.reference, states, RewardParams{}, memory, device.stream()));
  check(mix(of.rows, of.policy, of.reference, {states.policy_state, states.ref_state, beta},
            {floats(jsd), floats(mixture_kl), false}, memory, device.stream()));
  return {jsd, mixture_kl, policy_state, ref_state};
}

inline Tensor mixture_part(const Tensor& logits, const Tensor& ref_logits,
                           const OptionalTensor& mask, const Tensor& policy_state,
                           const Tensor& ref_state, double beta, double temperature,
                           double ref_temperature, std::optional<double> softcap,
                           std::optional<double> ref_softcap) {
  const MixtureTensors of(logits, ref_logits, mask, temperature, ref_temperature, softcap,
                          ref_softcap);
  Tensor sums = new_rows(logits, 2);
  const Device device(logits);
  const Tensor scratch =
      torch::stable::new_empty(logits, {mix_scratch_bytes(of.rows)}, ScalarType::Byte);
  check(mix(of.rows, of.policy, of.reference, finished_rows(policy_state, ref_state, beta, logits),
            {floats(sums), floats(sums) + of.rows.n_rows, true}, scratch.mutable_data_ptr(),
            device.stream()));
  return sums;
}

inline void token_jsd_backward(const Tensor& grad_jsd, const Tensor& logits,
                               const Tensor& ref_logits, const OptionalTensor& mask,
                               const Tensor& policy_state, const Tensor& ref_state,
                               const Tensor& mixture_kl, double beta, double temperature,
                               double ref_temperature, std::optional<double> softcap,
                               std::optional<double> ref_softcap, const Tensor& grad_logits) {
  const MixtureTensors of(logits, ref_logits, mask, temperature, ref_temperature, softcap,
                          ref_softcap);
  const int64_t n = of.rows.n_rows;
  const SavedMixture saved{data_of<float>(grad_jsd, "grad_jsd", ScalarType::Float, n, logits),
                           data_of<float>(mixture_kl, "mixture_kl", ScalarType::Float, n, logits),
                           temperature};
  const GradLogits grad = grad_logits_of(grad_logits, "grad_logits", logits);
  const Device device(logits);
  check(mix_backward(of.rows, of.policy, of.reference,
                     finished_rows(policy_state, ref_state, beta, logits), saved, grad,
                     device.stream()));
}

}  // namespace kl_kernels
