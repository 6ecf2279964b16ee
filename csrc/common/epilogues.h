// Epilogues of a finished row: a shaped reward, or a policy loss and its gradient. Once for host
// and device; kl_kernels/algebra/epilogues.py says the same in PyTorch.
#pragma once

#include <cfloat>
#include <cstdint>

#include "row_math.h"

namespace kl_kernels {

// In the order of ESTIMATORS in kl_kernels/schemas.py.
enum class Estimator { k1, exact, k2, k3, abs };

// How rewards are shaped.
struct RewardParams {
  const float* scores;         // [B]
  const int64_t* score_index;  // [B], -1 for nowhere
  float kl_coef;
  Estimator estimator;
  float kl_clip;  // +inf: none
};

struct ShapedReward {
  float reward;                // -kl_coef * KL, without the score
  float advantage_correction;  // what exact KL in the reward owes the sampled token
};

KL_HOST_DEVICE float clip(float value, float bound) {
  return value < -bound ? -bound : value > bound ? bound : value;  // NaN stays NaN
}

// Whether a token's probability is 0 on both sides.
KL_HOST_DEVICE bool both_rule_out(float logprob, float other) {
  return logprob == -INFINITY && other == -INFINITY;
}

// The difference, and 0 where both are -inf: a token that both sides rule out has a ratio of 1.
KL_HOST_DEVICE float log_ratio_of(float logprob, float other) {
  return both_rule_out(logprob, other) ? 0.0f : logprob - other;
}

// exp(-d) - 1 + d; +inf where d is infinite either way: -inf ends at a finite number, since the
// sum would be inf - inf.
KL_HOST_DEVICE float k3_of(float d) { return expm1f(-d) + (d < -FLT_MAX ? -FLT_MAX : d); }

// Schulman (2020), "Approximating KL divergence"; kl_clip is +inf for none.
KL_HOST_DEVICE ShapedReward reward_epilogue(const Finished<float>& f, float kl_coef,
                                            Estimator estimator, float kl_clip) {
  const float k1 = log_ratio_of(f.logprob, f.ref_logprob);
  float estimate = k1;
  if (estimator == Estimator::exact) estimate = f.kl;
  if (estimator == Estimator::k2) estimate = k1 * k1 / 2;
  if (estimator == Estimator::k3) estimate = k3_of(k1);
  if (estimator == Estimator::abs) estimate = fabsf(k1);
  estimate = clip(estimate, kl_clip);
  const float clipped = clip(k1, kl_clip);
  // Where the reference alone rules the token out, both are +inf.
  const float shortfall =
      estimator == Estimator::exact && clipped != estimate ? clipped - estimate : 0.0f;
  // Without a penalty an infinite KL is nobody's business: 0 * inf would be NaN.
  if (kl_coef == 0) return {0.0f, 0.0f};
  return {-kl_coef * estimate, -kl_coef * shortfall};
}

// Per-token inputs of the loss besides the logits.
struct PolicyLossInputs {
  float old_logprob, advantage;
  float token_weight;       // of the token's loss in the whole
  float importance_weight;  // of the clipped loss in the token's
  float ref_logprob;        // for k2 and k3
};

struct PolicyLossParams {
  float clip_low, clip_high;
  float dual_clip, log_ratio_clamp;  // +inf: none
  float kl_coef, entropy_coef;
  Estimator estimator;  // exact, k2 or k3
};

constexpr int kPolicyLossTerms = 8;  // POLICY_LOSS_TERMS in kl_kernels/schemas.py

struct PolicyLoss {
  float terms[kPolicyLossTerms];
  Upstream<double> gradient;
};

// With r = exp(logprob - old_logprob), A the advantage, rho the importance weight and m the
// token's,
//
//     loss = m (rho max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H)
//
// and the maximum bounded by -A dual_clip where A < 0. Where a clip decides, the clipped loss is a
// constant, as is r of a token that both policies rule out; the clamp of log r lets the gradient
// pass.
KL_HOST_DEVICE PolicyLoss policy_loss_epilogue(const Finished<float>& f,
                                               const PolicyLossInputs& row,
                                               const PolicyLossParams& params) {
  const float log_ratio = clip(log_ratio_of(f.logprob, row.old_logprob), params.log_ratio_clamp);
  const float ratio = expf(log_ratio), lowest = 1 - params.clip_low, highest = 1 + params.clip_high;
  const float clipped_ratio = ratio < lowest ? lowest : ratio > highest ? highest : ratio;
  const float unclipped = -row.advantage * ratio, clipped = -row.advantage * clipped_ratio;
  const bool clip_decides = clipped > unclipped;
  float loss = clip_decides ? clipped : unclipped;
  const float bound = -row.advantage * params.dual_clip;
  const bool dual_clip_decides = row.advantage < 0 && loss > bound;
  if (dual_clip_decides) loss = bound;
  loss *= row.importance_weight;
  // d r / d logprob = r, so the unclipped loss is its own derivative.
  const bool constant =
      clip_decides || dual_clip_decides || both_rule_out(f.logprob, row.old_logprob);
  double slope = constant ? 0 : row.importance_weight * unclipped;

  float kl = f.kl, kl_slope = 0;
  if (params.estimator != Estimator::exact) {
    const float d = clip(log_ratio_of(f.logprob, row.ref_logprob), params.log_ratio_clamp);
    const bool k2 = params.estimator == Estimator::k2;
    kl = k2 ? d * d / 2 : k3_of(d);
    kl_slope = k2 ? d : -expm1f(-d);
  }
  if (params.kl_coef != 0) {  // without a penalty an infinite KL is nobody's business
    loss += params.kl_coef * kl;
    slope += double(params.kl_coef) * kl_slope;
  }
  if (params.entropy_coef != 0) loss -= params.entropy_coef * f.entropy;

  const double m = row.token_weight;
  const double kl_gradient = params.estimator == Estimator::exact ? params.kl_coef : 0.0f;
  return {{row.token_weight * loss, float(clip_decides), float(dual_clip_decides),
           k3_of(-log_ratio), -log_ratio, ratio, kl, f.entropy},
          {m * slope, m * kl_gradient, 0.0, -m * params.entropy_coef}};
}

}  // namespace kl_kernels
