// Generalised advantage estimation of one sequence.
#pragma once

#include <cstdint>

namespace kl_kernels {

// Schulman et al. (2016), equation 16, from the last token back; 0 follows the last token. Skipping
// hands a masked token's successor on to its predecessor, as if it were not there; otherwise masked
// rewards and values count as 0, and time passes over them.
inline void gae_sequence(const float* rewards,  // [T]
                         const float* values,   // [T]
                         const bool* mask,      // [T]
                         int64_t n_tokens, double gamma, double lam, bool skip_masked,
                         float* advantages,  // [T]
                         float* returns      // [T]
) {
  double next_value = 0, next_advantage = 0;
  for (int64_t t = n_tokens - 1; t >= 0; --t) {
    const double reward = mask[t] ? rewards[t] : 0, value = mask[t] ? values[t] : 0;
    const double advantage = reward + gamma * next_value - value + gamma * lam * next_advantage;
    advantages[t] = mask[t] ? float(advantage) : 0.0f;
    returns[t] = mask[t] ? float(advantage + value) : 0.0f;
    if (mask[t] || !skip_masked) {
      next_value = value;
      next_advantage = advantage;
    }
  }
}

}  // namespace kl_kernels
