// The operators of kl_kernels/schemas.py for CUDA: checks, allocation, device and stream.
#include <tuple>

#include "../common/register.h"
#include "jsd.h"
#include "tensors.h"

namespace kl_kernels::bindings {
namespace {

void run_forward(const Tensor& tensor, const Rows& rows, const Models& models,
                 const Outputs& outputs, const RewardParams& params) {
  const Device device(tensor);
  // From torch's allocator: it may be given back while the kernels are still to run, and it may be
  // taken during the capture of a CUDA graph.
  const Tensor scratch = torch::stable::new_empty(tensor, {scratch_bytes(rows)}, ScalarType::Byte);
  check(forward(rows, models.policy, models.reference, outputs, params, scratch.mutable_data_ptr(),
                device.stream()));
}

Tensor fold_part(const Tensor& logits, const OptionalTensor& ref_logits, const Tensor& token_ids,
                 const OptionalTensor& mask, double temperature, double ref_temperature,
                 std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Models models =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  Tensor state = new_rows(logits, ref_logits ? kStateFields : kStateFieldsWithoutRef);
  Outputs out{};
  out.part_state = floats(state);
  run_forward(logits, rows_of(logits, token_ids, mask), models, out, RewardParams{});
  return state;
}

Tensor fold_tail(const Tensor& logits, const Tensor& token_ids, const Tensor& skipped_ids,
                 const OptionalTensor& mask, double temperature, std::optional<double> softcap) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  const Rows rows = rows_of(logits, token_ids, mask);
  const SkippedIds skipped = skipped_ids_of(skipped_ids, logits);
  Tensor state = new_rows(logits, kStateFieldsWithoutRef);
  Outputs out{};
  out.part_state = floats(state);
  const Device device(logits);
  const Tensor scratch = torch::stable::new_empty(logits, {scratch_bytes(rows)}, ScalarType::Byte);
  check(kl_kernels::fold_tail(rows, policy, skipped, out, scratch.mutable_data_ptr(),
                              device.stream()));
  return state;
}

std::tuple<Tensor, Tensor, Tensor> token_stats(const Tensor& logits, const Tensor& token_ids,
                                               const OptionalTensor& mask, double temperature,
                                               std::optional<double> softcap) {
  const Models models = models_of(logits, std::nullopt, temperature, temperature, softcap, softcap);
  Tensor logprob = new_rows(logits), entropy = new_rows(logits), state = new_rows(logits, 2);
  Outputs out{};
  out.logprob = floats(logprob);
  out.entropy = floats(entropy);
  out.policy_state = floats(state);
  run_forward(logits, rows_of(logits, token_ids, mask), models, out, RewardParams{});
  return {logprob, entropy, state};
}

using KLTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Outputs of token_kl and kl_rewards; `out` and `params` say what of the reward is wanted.
KLTensors token_kl_into(Outputs out, const RewardParams& params, const Tensor& logits,
                        const Models& models, const Rows& rows) {
  Tensor logprob = new_rows(logits), ref_logprob = new_rows(logits), kl = new_rows(logits);
  Tensor forward_kl = new_rows(logits), entropy = new_rows(logits);
  Tensor policy_state = new_rows(logits, 2), ref_state = new_rows(logits, 2);
  out.logprob = floats(logprob);
  out.ref_logprob = floats(ref_logprob);
  out.kl = floats(kl);
  out.forward_kl = floats(forward_kl);
  out.entropy = floats(entropy);
  out.policy_state = floats(policy_state);
  out.ref_state = floats(ref_state);
  run_forward(logits, rows, models, out, params);
  return {logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state};
}

KLTensors token_kl(const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids,
                   const OptionalTensor& mask, double temperature, double ref_temperature,
                   std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Models models =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  return token_kl_into(Outputs{}, RewardParams{}, logits, models, rows_of(logits, token_ids, mask));
}

KLTensors finish_parts(const Tensor& states, const OptionalTensor& ranges,
                       const OptionalTensor& mask) {
  const PartStates parts = part_states_of(states, ranges);
  const bool* const counts = data_of<bool>(mask, "mask", ScalarType::Bool, parts.n_rows, states);
  Tensor logprob = new_rows_of_parts(states), ref_logprob = new_rows_of_parts(states);
  Tensor kl = new_rows_of_parts(states), forward_kl = new_rows_of_parts(states);
  Tensor entropy = new_rows_of_parts(states);
  Tensor policy_state = new_states_of_parts(states), ref_state = new_states_of_parts(states);
  Outputs out{};
  out.logprob = floats(logprob);
  out.ref_logprob = floats(ref_logprob);
  out.kl = floats(kl);
  out.forward_kl = floats(forward_kl);
  out.entropy = floats(entropy);
  out.policy_state = floats(policy_state);
  out.ref_state = floats(ref_state);
  const Device device(states);
  check(kl_kernels::finish_parts(parts, counts, out, device.stream()));
  return {logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_rewards(
    const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids, const Tensor& mask,
    const Tensor& scores, const Tensor& score_index, double kl_coef, int64_t estimator,
    std::optional<double> kl_clip, double temperature, double ref_temperature,
    std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Models models =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  Tensor rewards = new_rows(logits), correction = new_rows(logits);
  Outputs out{};
  out.rewards = floats(rewards);
  out.advantage_correction = floats(correction);
  const RewardParams params =
      reward_params(scores, score_index, kl_coef, estimator, kl_clip, logits);
  return std::tuple_cat(
      std::make_tuple(rewards, correction),
      token_kl_into(out, params, logits, models, rows_of(logits, token_ids, mask)));
}

void run_backward(const Tensor& logits, const Rows& rows, const Models& models, const Saved& saved,
                  const Tensor& grad_logits) {
  const GradLogits grad = grad_logits_of(grad_logits, "grad_logits", logits);
  const Device device(logits);
  check(backward(rows, models.policy, models.reference, saved, grad, device.stream()));
}

void token_stats_backward(const OptionalTensor& grad_logprob, const OptionalTensor& grad_entropy,
                          const Tensor& logits, const Tensor& token_ids, const OptionalTensor& mask,
                          const Tensor& policy_state, const Tensor& entropy, double temperature,
                          std::optional<double> softcap, bool part, const Tensor& grad_logits) {
  const Models models = models_of(logits, std::nullopt, temperature, temperature, softcap, softcap);
  Saved saved{};
  saved.grad_logprob = floats_of(grad_logprob, "grad_logprob", logits);
  saved.grad_entropy = floats_of(grad_entropy, "grad_entropy", logits);
  saved.policy_state = state_of(policy_state, "policy_state", logits);
  saved.entropy = floats_of(entropy, "entropy", logits);
  saved.temperature = temperature;
  saved.part = part;
  run_backward(logits, rows_of(logits, token_ids, mask), models, saved, grad_logits);
}

void token_kl_backward(const OptionalTensor& grad_logprob, const OptionalTensor& grad_kl,
                       const OptionalTensor& grad_forward_kl, const OptionalTensor& grad_entropy,
                       const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids,
                       const OptionalTensor& mask, const Tensor& policy_state,
                       const Tensor& ref_state, const Tensor& kl, const Tensor& entropy,
                       double temperature, double ref_temperature, std::optional<double> softcap,
                       std::optional<double> ref_softcap, bool part, const Tensor& grad_logits) {
  const Models models =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Saved saved{floats_of(grad_logprob, "grad_logprob", logits),
                    floats_of(grad_kl, "grad_kl", logits),
                    floats_of(grad_forward_kl, "grad_forward_kl", logits),
                    floats_of(grad_entropy, "grad_entropy", logits),
                    state_of(policy_state, "policy_state", logits),
                    state_of(ref_state, "ref_state", logits),
                    floats_of(kl, "kl", logits),
                    floats_of(entropy, "entropy", logits),
                    temperature,
                    part};
  run_backward(logits, rows_of(logits, token_ids, mask), models, saved, grad_logits);
}

Tensor policy_loss(const Tensor& logits, const OptionalTensor& ref_logits, const Tensor& token_ids,
                   const Tensor& mask, const OptionalTensor& old_logprobs, const Tensor& advantages,
                   const Tensor& token_weights, const OptionalTensor& importance_weights,
                   const OptionalTensor& ref_logprobs, double clip_low, double clip_high,
                   std::optional<double> dual_clip, std::optional<double> log_ratio_clamp,
                   double kl_coef, int64_t kl_estimator, double entropy_coef, double temperature,
                   double ref_temperature, std::optional<double> softcap,
                   std::optional<double> ref_softcap, const OptionalTensor& own_gradient,
                   const OptionalTensor& grad_logits) {
  refuse_own_gradient(own_gradient);
  const Models models =
      models_of(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  GradLogits grad{};
  if (grad_logits) grad = grad_logits_of(*grad_logits, "grad_logits", logits);
  const PolicyLossTokens tokens{floats_of(old_logprobs, "old_logprobs", logits),
                                floats_of(advantages, "advantages", logits),
                                floats_of(token_weights, "token_weights", logits),
                                floats_of(importance_weights, "importance_weights", logits),
                                floats_of(ref_logprobs, "ref_logprobs", logits)};
  const PolicyLossParams params = policy_loss_params(
      clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef);
  const Device device(logits);
  Tensor terms = new_rows(logits, kPolicyLossTerms);
  check(kl_kernels::policy_loss(rows_of(logits, token_ids, mask), models.policy, models.reference,
                                tokens, params, temperature, grad, floats(terms), device.stream()));
  return terms;
}

void scale_gradient(const Tensor& gradient, const Tensor& factor) {
  const GradLogits grad = grad_logits_of(gradient, "gradient", gradient);
  const Rows rows = rows_of(gradient, std::nullopt, OptionalTensor());
  const Device device(gradient);
  check(scale(rows, grad, dtype_of(gradient, "gradient"),
              data_of<float>(factor, "factor", ScalarType::Float, 1, gradient), device.stream()));
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                               double gamma, double lam, bool skip_masked,
                               const OptionalTensor& cu_seqlens) {
  const Device device(rewards);
  const int64_t* const bounds = cu_seqlens_of(cu_seqlens, rewards);
  const int64_t n_sequences = cu_seqlens ? cu_seqlens->numel() - 1 : rewards.size(0);
  Tensor advantages = new_rows(rewards), returns = new_rows(rewards);
  check(gae_rows(floats_of(rewards, "rewards", rewards), floats_of(values, "values", rewards),
                 mask_of(mask, rewards), n_sequences, rewards.size(1), gamma, lam, skip_masked,
                 bounds, floats(advantages), floats(returns), device.stream()));
  return {advantages, returns};
}

}  // namespace
}  // namespace kl_kernels::bindings

KL_KERNELS_REGISTER(kl_kernels_cuda, CUDA)
