// The launches of csrc/cuda as functions of a host library, for cuda_on_host.py: with the launch
// policies of a GPU if KL_PRODUCTION_LAUNCH is defined, and otherwise with blocks and parts so
// small that a few thousand logits take every path: several tiles, several parts, tails, both
// loops.
#pragma once

#include "../../../csrc/cuda/backward.cuh"
#include "../../../csrc/cuda/forward.cuh"
#include "../../../csrc/cuda/gae.cuh"
#include "../../../csrc/cuda/mixture.cuh"
#include "../../../csrc/cuda/parts.cuh"
#include "../../../csrc/cuda/policy_loss.cuh"
#include "../../../csrc/cuda/scale.cuh"
#include "../../../csrc/cuda/tail.cuh"

using namespace kl_kernels;

#if defined(KL_PRODUCTION_LAUNCH)
using Launch = LaunchPolicy;
using PolicyLossLaunches = PolicyLossLaunch;
#else
struct Launch {
  static constexpr int kThreads = 64, kUnroll = 2, kUnrollWithoutRef = 4, kBlocksPerSm = 1,
                       kBlocksPerSmForAny = 1;
  static constexpr bool kFastLoop = true;
  static constexpr int kPart = 2048;  // two double tiles
  static constexpr int kScaleBlocks = 3;
};

struct PolicyLossLaunches {
  struct Resident {
    static constexpr int kThreads = 64, kUnroll = 2, kUnrollWithoutRef = 4, kBlocksPerSm = 3;
    static constexpr bool kFastLoop = true;
  };
  struct Reread {
    static constexpr int kThreads = 64, kUnroll = 2, kUnrollWithoutRef = 4, kBlocksPerSm = 1;
    static constexpr bool kFastLoop = false;
  };
  using RereadAny = Reread;
};
#endif

extern "C" {

int64_t host_scratch_bytes(const Rows* rows) { return forward_scratch_bytes<Launch>(*rows); }

int host_forward(const Rows* rows, const Logits* policy, const Logits* reference,
                 const Outputs* outputs, const RewardParams* shape, void* scratch) {
  return launch_forward<Launch>(*rows, *policy, *reference, *outputs, *shape, scratch, nullptr);
}

int host_fold_tail(const Rows* rows, const Logits* policy, const SkippedIds* skipped,
                   const Outputs* outputs, void* scratch) {
  return launch_tail<Launch>(*rows, *policy, *skipped, *outputs, scratch, nullptr);
}

int host_finish_parts(const PartStates* parts, const bool* mask, const Outputs* outputs) {
  return launch_finish_parts(*parts, mask, *outputs, nullptr);
}

int host_backward(const Rows* rows, const Logits* policy, const Logits* reference,
                  const Saved* saved, const GradLogits* grad_logits) {
  return launch_backward<Launch>(*rows, *policy, *reference, *saved, *grad_logits, nullptr);
}

int64_t host_mix_scratch_bytes(const Rows* rows) { return mix_scratch_bytes<Launch>(*rows); }

int host_mix(const Rows* rows, const Logits* policy, const Logits* reference,
             const FinishedRows* of, const MixtureOutputs* outputs, void* scratch) {
  return launch_mix<Launch>(*rows, *policy, *reference, *of, *outputs, scratch, nullptr);
}

int host_mix_backward(const Rows* rows, const Logits* policy, const Logits* reference,
                      const FinishedRows* of, const SavedMixture* saved,
                      const GradLogits* grad_logits) {
  return launch_mix_backward<Launch>(*rows, *policy, *reference, *of, *saved, *grad_logits,
                                     nullptr);
}

int host_policy_loss(const Rows* rows, const Logits* policy, const Logits* reference,
                     const PolicyLossTokens* tokens, const PolicyLossParams* shape,
                     double temperature, const GradLogits* grad_logits, float* terms) {
  return launch_policy_loss<PolicyLossLaunches>(*rows, *policy, *reference, *tokens, *shape,
                                                temperature, *grad_logits, terms, nullptr);
}

int host_scale(const Rows* rows, const GradLogits* gradient, Dtype dtype, const float* factor) {
  return launch_scale<Launch>(*rows, *gradient, dtype, factor, nullptr);
}

int host_gae(const float* rewards, const float* values, const bool* mask, int64_t n_batch,
             int64_t n_tokens, double gamma, double lam, bool skip_masked,
             const int64_t* cu_seqlens, float* advantages, float* returns) {
  return launch_gae(rewards, values, mask, n_batch, n_tokens, gamma, lam, skip_masked, cu_seqlens,
                    advantages, returns, nullptr);
}
}
