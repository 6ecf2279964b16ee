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

namespace bindings {

inline Tensor policy_loss(const Tensor& logits, const OptionalTensor& ref_logits,
                          const Tensor& token_ids, const Tensor& mask,
                          const OptionalTensor& old_logprobs, const Tensor& advantages,
                          const Tensor& token_weights, const OptionalTensor& importance_weights,
                          const OptionalTensor& ref_logprobs, double clip_low, double clip_high,
                          std::optional<double> dual_clip, std::optional<double> log_ratio_clamp,
                          double kl_coef, int64_t kl_estimator, double entropy_coef,
                          double temperature, double ref_temperature, std::optional<double> softcap,
                          std::optional<double> ref_softcap, const OptionalTensor& own_gradient,
                          const OptionalTensor& grad_logits) {
  refuse_own_gradient(own_gradient);
  const Models models(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  std::optional<GradientRows> gradients;
  if (grad_logits) gradients.emplace(*grad_logits, models.logits);
  const Tokens tokens(token_ids, mask, models.logits);
  const PolicyLossTensors inputs{floats_of(old_logprobs, "old_logprobs", logits),
                                 floats_of(advantages, "advantages", logits),
                                 floats_of(token_weights, "token_weights", logits),
                                 floats_of(importance_weights, "importance_weights", logits),
                                 floats_of(ref_logprobs, "ref_logprobs", logits)};
  const PolicyLossParams params = policy_loss_params(
      clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef);
  Tensor terms = new_rows(logits, kPolicyLossTerms);
  float* const term_data = floats(terms);
  const int64_t n = models.n_rows();

  for_each_row(n, 4 * models.vocab_size(), [&](int64_t row) {
    PolicyLoss loss{};
    if (tokens.counts(row)) {
      const Row policy = models.policy(row), reference = models.reference(row);
      double tx, ty;
      const RowState<double> s =
          row_kernels().fold(policy, reference, models.vocab_size(), tokens[row], &tx, &ty);
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

}  // namespace bindings
}  // namespace kl_kernels
