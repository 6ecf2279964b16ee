#include "policy_loss.cuh"

namespace kl_kernels {

cudaError_t policy_loss(const Rows& rows, const Logits& policy, const Logits& reference,
                        const PolicyLossTokens& tokens, const PolicyLossParams& params,
                        double temperature, const GradLogits& grad_logits, float* terms,
                        cudaStream_t stream) {
  return launch_policy_loss<PolicyLossLaunch>(rows, policy, reference, tokens, params, temperature,
                                              grad_logits, terms, stream);
}

}  // namespace kl_kernels
