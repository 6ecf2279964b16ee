// Generalised advantage estimation, one warp per sequence.
//
// Schulman et al. (2016), equation 16, from the last token back, in float64; 0 follows the last
// token. A warp loads 32 tokens at once; then every lane goes through them one after the other, so
// that the sum is taken in the order of its definition, and keeps the result of its own token.
#pragma once

#include "block.cuh"
#include "launch.h"

namespace kl_kernels {

// CUDA kernels

// Skipping hands a masked token's successor on to its predecessor, as if it were not there;
// otherwise masked rewards and values count as 0, and time passes over them.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    gae_kernel(const float* rewards,  // [B, T]
               const float* values,   // [B, T]
               const bool* mask,      // [B, T]
               int64_t n_batch, int64_t n_tokens, double gamma, double lam, bool skip_masked,
               const int64_t* cu_seqlens,  // [B + 1] of packed sequences, all else [T]; or null
               float* advantages,          // [B, T]
               float* returns              // [B, T]
    ) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t b = thread / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (b >= n_batch) return;  // a whole warp at a time
  int64_t base = b * n_tokens;
  if (cu_seqlens != nullptr) {
    // Whatever is wrong with them: no access out of bounds, and no token without a value.
    const int64_t n = n_tokens;
    const auto bound = [=](int64_t i) -> int64_t {
      if (i == 0 || i == n_batch) return i == 0 ? 0 : n;
      const int64_t given = cu_seqlens[i];
      return given < 0 ? 0 : given > n ? n : given;
    };
    base = bound(b);
    n_tokens = bound(b + 1) - base;
  }
  double next_value = 0, next_advantage = 0;
  for (int64_t end = n_tokens; end > 0; end -= kWarp) {
    const int64_t at = base + end - 1 - lane;  // lane 0 has the last token
    const bool here = lane < end && mask[at];
    const float reward = here ? rewards[at] : 0.0f, value = here ? values[at] : 0.0f;
    double mine = 0;
    for (int i = 0; i < kWarp && i < end; ++i) {
      const double v = __shfl_sync(kAllLanes, value, i);
      const bool counts = __shfl_sync(kAllLanes, static_cast<int>(here), i) || !skip_masked;
      const double delta = __shfl_sync(kAllLanes, reward, i) + gamma * next_value - v;
      const double advantage = delta + gamma * lam * next_advantage;
      if (i == lane) mine = advantage;
      if (counts) {
        next_value = v;
        next_advantage = advantage;
      }
    }
    if (lane >= end) continue;
    advantages[at] = here ? static_cast<float>(mine) : 0.0f;
    returns[at] = here ? static_cast<float>(mine + value) : 0.0f;
  }
}

// Launchers

inline cudaError_t launch_gae(const float* rewards, const float* values, const bool* mask,
                              int64_t n_batch, int64_t n_tokens, double gamma, double lam,
                              bool skip_masked, const int64_t* cu_seqlens, float* advantages,
                              float* returns, cudaStream_t stream) {
  constexpr int kThreads = 2 * kWarp;  // few sequences: spread them over many SMs
  constexpr int64_t kRows = kThreads / kWarp;
  return launch(gae_kernel<kThreads>, {(n_batch + kRows - 1) / kRows, kThreads}, stream, rewards,
                values, mask, n_batch, n_tokens, gamma, lam, skip_masked, cu_seqlens, advantages,
                returns);
}

}  // namespace kl_kernels
