#include "gae.cuh"

namespace kl_kernels {

cudaError_t gae_rows(const float* rewards, const float* values, const bool* mask, int64_t n_batch,
                     int64_t n_tokens, double gamma, double lam, bool skip_masked,
                     const int64_t* cu_seqlens, float* advantages, float* returns,
                     cudaStream_t stream) {
  return launch_gae(rewards, values, mask, n_batch, n_tokens, gamma, lam, skip_masked, cu_seqlens,
                    advantages, returns, stream);
}

}  // namespace kl_kernels
