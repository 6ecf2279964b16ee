// The operators of kl_kernels/schemas.py for CUDA: checks, allocation, device and stream. The
// schemas themselves are defined in Python (kl_kernels/backends/compiled.py), this library only
// implements them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "jsd.h"
#include "tensors.h"

namespace kl_kernels {
namespace {

Rows rows_of(const Tensor& logits, const Tensor& token_ids, const OptionalTensor& mask) {
  const int64_t n_rows = logits.size(0) * logits.size(1);
  return {n_rows, logits.size(1), logits.size(2),
          data_of<int64_t>(token_ids, "token_ids", ScalarType::Long, n_rows, logits),
          data_of<bool>(mask, "mask", ScalarType::Bool, n_rows, logits)};
}

Tensor per_token(const Tensor& logits) {  // [B, T]
  return torch::stable::new_empty(logits, {logits.size(0), logits.size(1)}, ScalarType::Float);
}

Tensor new_state(const Tensor& logits) {  // [2, B, T]
  return torch::stable::new_empty(logits, {2, logits.size(0), logits.size(1)}, ScalarType::Float);
}

float* data(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

void run_forward(const Tensor& tensor, const Rows& rows, const Logits& policy,
                 const Logits& reference, const Outputs& outputs, const RewardParams& params) {
  const Device device(tensor);
  // From torch's allocator: it may be given back while the kernels are still to run, and it may be
  // taken during the capture of a CUDA graph.
  const Tensor scratch = torch::stable::new_empty(tensor, {scratch_bytes(rows)}, ScalarType::Byte);
  check(forward(rows, policy, reference, outputs, params, scratch.mutable_data_ptr(),
                device.stream()));
}

Tensor fold_part(const Tensor& logits, const OptionalTensor& ref_logits, const Tensor& token_ids,
                 const OptionalTensor& mask, double temperature, double ref_temperature,
                 std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  Logits reference{};
  if (ref_logits) {
    reference = logits_of(*ref_logits, "ref_logits", ref_temperature, ref_softcap);
    check_like(*ref_logits, "ref_logits", logits);
  }
  Tensor state = torch::stable::new_empty(
      logits, {ref_logits ? kStateFields : kStateFieldsWithoutRef, logits.size(0), logits.size(1)},
      ScalarType::Float);
  Outputs out{};
  out.part_state = data(state);
  run_forward(logits, rows_of(logits, token_ids, mask), policy, reference, out, RewardParams{});
  return state;
}

std::tuple<Tensor, Tensor, Tensor> token_stats(const Tensor& logits, const Tensor& token_ids,
                                               const OptionalTensor& mask, double temperature,
                                               std::optional<double> softcap) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  Tensor logprob = per_token(logits), entropy = per_token(logits), state = new_state(logits);
  Outputs out{};
  out.logprob = data(logprob);
  out.entropy = data(entropy);
  out.policy_state = data(state);
  run_forward(logits, rows_of(logits, token_ids, mask), policy, Logits{}, out, RewardParams{});
  return {logprob, entropy, state};
}

using KlTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

KlTensors token_kl_into(Outputs out, const RewardParams& params, const Tensor& logits,
                        const Tensor& ref_logits, const Rows& rows, double temperature,
                        double ref_temperature, std::optional<double> softcap,
                        std::optional<double> ref_softcap) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  const Logits reference = logits_of(ref_logits, "ref_logits", ref_temperature, ref_softcap);
  check_like(ref_logits, "ref_logits", logits);
  Tensor logprob = per_token(logits), ref_logprob = per_token(logits), kl = per_token(logits);
  Tensor forward_kl = per_token(logits), entropy = per_token(logits);
  Tensor policy_state = new_state(logits), ref_state = new_state(logits);
  out.logprob = data(logprob);
  out.ref_logprob = data(ref_logprob);
  out.kl = data(kl);
  out.forward_kl = data(forward_kl);
  out.entropy = data(entropy);
  out.policy_state = data(policy_state);
  out.ref_state = data(ref_state);
  run_forward(logits, rows, policy, reference, out, params);
  return {logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state};
}

KlTensors token_kl(const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids,
                   const OptionalTensor& mask, double temperature, double ref_temperature,
                   std::optional<double> softcap, std::optional<double> ref_softcap) {
  return token_kl_into(Outputs{}, RewardParams{}, logits, ref_logits,
                       rows_of(logits, token_ids, mask), temperature, ref_temperature, softcap,
                       ref_softcap);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_rewards(
    const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids, const Tensor& mask,
    const Tensor& scores, const Tensor& score_index, double kl_coef, int64_t estimator,
    std::optional<double> kl_clip, double temperature, double ref_temperature,
    std::optional<double> softcap, std::optional<double> ref_softcap) {
  Tensor rewards = per_token(logits), correction = per_token(logits);
  Outputs out{};
  out.rewards = data(rewards);
  out.advantage_correction = data(correction);
  const int64_t n_batch = logits.size(0);
  const RewardParams params{
      data_of<float>(scores, "scores", ScalarType::Float, n_batch, logits),
      data_of<int64_t>(score_index, "score_index", ScalarType::Long, n_batch, logits),
      static_cast<float>(kl_coef), static_cast<Estimator>(estimator),
      static_cast<float>(kl_clip.value_or(INFINITY))};
  return std::tuple_cat(
      std::make_tuple(rewards, correction),
      token_kl_into(out, params, logits, ref_logits, rows_of(logits, token_ids, mask), temperature,
                    ref_temperature, softcap, ref_softcap));
}

void run_backward(const Tensor& logits, const Rows& rows, const Logits& policy,
                  const Logits& reference, const Saved& saved, const Tensor& grad_logits) {
  const GradLogits grad = grad_logits_of(grad_logits, "grad_logits", logits);
  const Device device(logits);
  check(backward(rows, policy, reference, saved, grad, device.stream()));
}

// Upstream gradients and saved values, each [B, T] or [2, B, T] float32.
class PerToken {
 public:
  explicit PerToken(const Tensor& logits) : logits_(logits) {}

  template <class T>  // Tensor or OptionalTensor
  const float* operator()(const T& tensor, const char* name) const {
    return data_of<float>(tensor, name, ScalarType::Float, n_rows(), logits_);
  }
  const float* state(const Tensor& tensor, const char* name) const {
    return data_of<float>(tensor, name, ScalarType::Float, 2 * n_rows(), logits_);
  }

 private:
  int64_t n_rows() const { return logits_.size(0) * logits_.size(1); }
  const Tensor& logits_;
};

void token_stats_backward(const OptionalTensor& grad_logprob, const OptionalTensor& grad_entropy,
                          const Tensor& logits, const Tensor& token_ids, const OptionalTensor& mask,
                          const Tensor& policy_state, const Tensor& entropy, double temperature,
                          std::optional<double> softcap, bool part, const Tensor& grad_logits) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  const PerToken per_token(logits);
  Saved saved{};
  saved.grad_logprob = per_token(grad_logprob, "grad_logprob");
  saved.grad_entropy = per_token(grad_entropy, "grad_entropy");
  saved.policy_state = per_token.state(policy_state, "policy_state");
  saved.entropy = per_token(entropy, "entropy");
  saved.temperature = temperature;
  saved.part = part;
  run_backward(logits, rows_of(logits, token_ids, mask), policy, Logits{}, saved, grad_logits);
}

void token_kl_backward(const OptionalTensor& grad_logprob, const OptionalTensor& grad_kl,
                       const OptionalTensor& grad_forward_kl, const OptionalTensor& grad_entropy,
                       const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids,
                       const OptionalTensor& mask, const Tensor& policy_state,
                       const Tensor& ref_state, const Tensor& kl, const Tensor& entropy,
                       double temperature, double ref_temperature, std::optional<double> softcap,
                       std::optional<double> ref_softcap, bool part, const Tensor& grad_logits) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  const Logits reference = logits_of(ref_logits, "ref_logits", ref_temperature, ref_softcap);
  check_like(ref_logits, "ref_logits", logits);
  const PerToken per_token(logits);
  Saved saved{};
  saved.grad_logprob = per_token(grad_logprob, "grad_logprob");
  saved.grad_kl = per_token(grad_kl, "grad_kl");
  saved.grad_forward_kl = per_token(grad_forward_kl, "grad_forward_kl");
  saved.grad_entropy = per_token(grad_entropy, "grad_entropy");
  saved.policy_state = per_token.state(policy_state, "policy_state");
  saved.ref_state = per_token.state(ref_state, "ref_state");
  saved.kl = per_token(kl, "kl");
  saved.entropy = per_token(entropy, "entropy");
  saved.temperature = temperature;
  saved.part = part;
  run_backward(logits, rows_of(logits, token_ids, mask), policy, reference, saved, grad_logits);
}

Tensor policy_loss_terms(const Tensor& logits, const OptionalTensor& ref_logits,
                         const Tensor& token_ids, const Tensor& mask,
                         const OptionalTensor& old_logprobs, const Tensor& advantages,
                         const Tensor& token_weights, const OptionalTensor& importance_weights,
                         const OptionalTensor& ref_logprobs, double clip_low, double clip_high,
                         std::optional<double> dual_clip, std::optional<double> log_ratio_clamp,
                         double kl_coef, int64_t kl_estimator, double entropy_coef,
                         double temperature, double ref_temperature, std::optional<double> softcap,
                         std::optional<double> ref_softcap, const OptionalTensor& grad_logits) {
  const Logits policy = logits_of(logits, "logits", temperature, softcap);
  Logits reference{};
  if (ref_logits) {
    reference = logits_of(*ref_logits, "ref_logits", ref_temperature, ref_softcap);
    check_like(*ref_logits, "ref_logits", logits);
  }
  GradLogits grad{};
  if (grad_logits) grad = grad_logits_of(*grad_logits, "grad_logits", logits);
  const PerToken per_token(logits);
  const PolicyLossTokens tokens{
      per_token(old_logprobs, "old_logprobs"), per_token(advantages, "advantages"),
      per_token(token_weights, "token_weights"),
      per_token(importance_weights, "importance_weights"), per_token(ref_logprobs, "ref_logprobs")};
  const PolicyLossParams params{static_cast<float>(clip_low),
                                static_cast<float>(clip_high),
                                static_cast<float>(dual_clip.value_or(INFINITY)),
                                static_cast<float>(log_ratio_clamp.value_or(INFINITY)),
                                static_cast<float>(kl_coef),
                                static_cast<float>(entropy_coef),
                                static_cast<Estimator>(kl_estimator)};
  const Device device(logits);
  Tensor terms = torch::stable::new_empty(
      logits, {kPolicyLossTerms, logits.size(0), logits.size(1)}, ScalarType::Float);
  check(policy_loss(rows_of(logits, token_ids, mask), policy, reference, tokens, params,
                    temperature, grad, data(terms), device.stream()));
  return terms;
}

void scale_gradient(const Tensor& gradient, const Tensor& factor) {
  const GradLogits grad = grad_logits_of(gradient, "gradient", gradient);
  const int64_t n_rows = gradient.size(0) * gradient.size(1);
  const Rows rows{n_rows, gradient.size(1), gradient.size(2), nullptr, nullptr};
  const Device device(gradient);
  check(scale(rows, grad, dtype_of(gradient, "gradient"),
              data_of<float>(factor, "factor", ScalarType::Float, 1, gradient), device.stream()));
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                               double gamma, double lam, bool skip_masked) {
  const Device device(rewards);
  const int64_t n_batch = rewards.size(0), n_tokens = rewards.size(1), n = n_batch * n_tokens;
  Tensor advantages = per_token(rewards), returns = per_token(rewards);
  check(gae_rows(data_of<float>(rewards, "rewards", ScalarType::Float, n, rewards),
                 data_of<float>(values, "values", ScalarType::Float, n, rewards),
                 data_of<bool>(mask, "mask", ScalarType::Bool, n, rewards), n_batch, n_tokens,
                 gamma, lam, skip_masked, data(advantages), data(returns), device.stream()));
  return {advantages, returns};
}

}  // namespace
}  // namespace kl_kernels

STABLE_TORCH_LIBRARY_IMPL(kl_kernels_cuda, CUDA, m) {
  m.impl("fold_part", TORCH_BOX(&kl_kernels::fold_part));
  m.impl("token_stats", TORCH_BOX(&kl_kernels::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&kl_kernels::token_stats_backward));
  m.impl("token_kl", TORCH_BOX(&kl_kernels::token_kl));
  m.impl("token_kl_backward", TORCH_BOX(&kl_kernels::token_kl_backward));
  m.impl("token_jsd", TORCH_BOX(&kl_kernels::token_jsd));
  m.impl("mixture_part", TORCH_BOX(&kl_kernels::mixture_part));
  m.impl("token_jsd_backward", TORCH_BOX(&kl_kernels::token_jsd_backward));
  m.impl("kl_rewards", TORCH_BOX(&kl_kernels::kl_rewards));
  m.impl("policy_loss", TORCH_BOX(&kl_kernels::policy_loss_terms));
  m.impl("scale_gradient", TORCH_BOX(&kl_kernels::scale_gradient));
  m.impl("gae", TORCH_BOX(&kl_kernels::gae));
}
