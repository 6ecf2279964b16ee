// token_jsd and what belongs to it: checks, allocation, device and stream.
#pragma once

#include <tuple>

#include "tensors.h"

namespace kl_kernels {

inline FinishedRows finished_rows(const Tensor& policy_state, const Tensor& ref_state, double beta,
                                  const Tensor& logits) {
  return {state_of(policy_state, "policy_state", logits), state_of(ref_state, "ref_state", logits),
          beta};
}

namespace bindings {

inline std::tuple<Tensor, Tensor, Tensor, Tensor> token_jsd(
    const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask, double beta,
    double temperature, double ref_temperature, std::optional<double> softcap,
    std::optional<double> ref_softcap) {
  const Models of =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Rows rows = rows_of(logits, std::nullopt, mask);
  Tensor jsd = new_rows(logits), mixture_kl = new_rows(logits);
  Tensor policy_state = new_rows(logits, 2), ref_state = new_rows(logits, 2);
  Outputs states{};
  states.policy_state = floats(policy_state);
  states.ref_state = floats(ref_state);
  const Device device(logits);
  const int64_t folds = scratch_bytes(rows), mixes = mix_scratch_bytes(rows);
  const Tensor scratch =
      torch::stable::new_empty(logits, {folds > mixes ? folds : mixes}, ScalarType::Byte);
  void* const memory = scratch.mutable_data_ptr();
  check(forward(rows, of.policy, of.reference, states, RewardParams{}, memory, device.stream()));
  check(mix(rows, of.policy, of.reference, {states.policy_state, states.ref_state, beta},
            {floats(jsd), floats(mixture_kl), false}, memory, device.stream()));
  return {jsd, mixture_kl, policy_state, ref_state};
}

inline Tensor mixture_part(const Tensor& logits, const Tensor& ref_logits,
                           const OptionalTensor& mask, const Tensor& policy_state,
                           const Tensor& ref_state, double beta, double temperature,
                           double ref_temperature, std::optional<double> softcap,
                           std::optional<double> ref_softcap) {
  const Models of =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Rows rows = rows_of(logits, std::nullopt, mask);
  Tensor sums = new_rows(logits, 2);
  const Device device(logits);
  const Tensor scratch =
      torch::stable::new_empty(logits, {mix_scratch_bytes(rows)}, ScalarType::Byte);
  check(mix(rows, of.policy, of.reference, finished_rows(policy_state, ref_state, beta, logits),
            {floats(sums), floats(sums) + rows.n_rows, true}, scratch.mutable_data_ptr(),
            device.stream()));
  return sums;
}

inline void token_jsd_backward(const Tensor& grad_jsd, const Tensor& logits,
                               const Tensor& ref_logits, const OptionalTensor& mask,
                               const Tensor& policy_state, const Tensor& ref_state,
                               const Tensor& mixture_kl, double beta, double temperature,
                               double ref_temperature, std::optional<double> softcap,
                               std::optional<double> ref_softcap, const Tensor& grad_logits) {
  const Models of =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Rows rows = rows_of(logits, std::nullopt, mask);
  const SavedMixture saved{floats_of(grad_jsd, "grad_jsd", logits),
                           floats_of(mixture_kl, "mixture_kl", logits), temperature};
  const GradLogits grad = grad_logits_of(grad_logits, "grad_logits", logits);
  const Device device(logits);
  check(mix_backward(rows, of.policy, of.reference,
                     finished_rows(policy_state, ref_state, beta, logits), saved, grad,
                     device.stream()));
}

}  // namespace bindings
}  // namespace kl_kernels
