// policy_loss: a row's statistics, its loss, and its gradient while the row is still in the cache.
#pragma once

#include "../common/epilogues.h"
#include "gradient_rows.h"
#include "parallel.h"

namespace kl_kernels {

// Per-token inputs of every row; what is absent has a default.
struct PolicyLossTensors {
  const float *old_logprobs, *advantages, *token_weights, *importance_weights, *ref_logprobs;

  PolicyLossInputs row(int64_t row, float logprob) const {
    return {old_logprobs == nullptr ? logprob : old_logprobs[row], advantages[row],
            token_weights[row], importance_weights == nullptr ? 1 : importance_weights[row],
            ref_logprobs == nullptr ? logprob : ref_logprobs[row]};
  }
};

inline Tensor policy_loss(
    const Tensor& logits_tensor, const std::optional<Tensor>& ref_logits_tensor,
    const Tensor& token_ids, const Tensor& mask, const std::optional<Tensor>& old_logprobs,
    const Tensor& advantages, const Tensor& token_weights,
    const std::optional<Tensor>& importance_weights, const std::optional<Tensor>& ref_logprobs,
    double clip_low, double clip_high, std::optional<double> dual_clip,
    std::optional<double> log_ratio_clamp, double kl_coef, int64_t kl_estimator,
    double entropy_coef, double temperature, double ref_temperature, std::optional<double> softcap,
    std::optional<double> ref_softcap, const std::optional<Tensor>& grad_logits) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  std::optional<Logits> ref_logits;
  if (ref_logits_tensor) {
    ref_logits.emplace(*ref_logits_tensor, "ref_logits", ref_temperature, ref_softcap);
    check(logits.same_shape(*ref_logits), "ref_logits has to have the shape of logits");
  }
  std::optional<GradientRows> gradients;
  if (grad_logits) gradients.emplace(*grad_logits, logits);
  const Tokens tokens(token_ids, mask, logits);
  const int64_t n = logits.n_rows();
  const auto per_row = [n](const auto& tensor, const char* name) {
    return data_of<float>(tensor, name, ScalarType::Float, n);
  };
  const PolicyLossTensors inputs{
      per_row(old_logprobs, "old_logprobs"), per_row(advantages, "advantages"),
      per_row(token_weights, "token_weights"), per_row(importance_weights, "importance_weights"),
      per_row(ref_logprobs, "ref_logprobs")};
  const PolicyLossParams params{float(clip_low),
                                float(clip_high),
                                float(dual_clip.value_or(INFINITY)),
                                float(log_ratio_clamp.value_or(INFINITY)),
                                float(kl_coef),
                                float(entropy_coef),
                                Estimator(kl_estimator)};
  Tensor terms = torch::stable::new_empty(
      logits_tensor, {kPolicyLossTerms, logits.n_batch(), logits.n_tokens()}, ScalarType::Float);
  float* const term_data = float_data(terms);

  for_each_row(n, 4 * logits.vocab_size(), [&](int64_t row) {
    PolicyLoss loss{};
    if (tokens.counts(row)) {
      const Row policy = logits.row(row),
                reference = ref_logits ? ref_logits->row(row) : kNoReference;
      double tx, ty;
      const RowState<double> s =
          row_kernels().fold(policy, reference, logits.vocab_size(), tokens[row], &tx, &ty);
      Finished<double> f = finish(s.sums, tx, ty);
      if (!ref_logits) f.kl = 0;  // of a policy alone, it is undefined
      loss = policy_loss_epilogue(to_float(f), inputs.row(row, float(f.logprob)), params);
      if (gradients)
        gradients->write(row, policy, asks_for_kl(loss.gradient) ? reference : kNoReference,
                         tokens[row], loss.gradient, RowStatistics::of(s, f), temperature);
    } else if (gradients) {
      gradients->set_zero(row);
    }
    for (int i = 0; i < kPolicyLossTerms; ++i) term_data[i * n + row] = loss.terms[i];
  });
  return terms;
}

}  // namespace kl_kernels
