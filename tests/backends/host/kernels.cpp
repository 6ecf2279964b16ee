// The CUDA kernels as a host library for tests/backends/test_cuda_on_host.py, with blocks and parts
// so small that a few thousand logits take every path: several tiles, several parts, tails, both
// loops.
#define KL_CUDA_ON_HOST
#include "../../../csrc/cuda/backward.cuh"
#include "../../../csrc/cuda/forward.cuh"
#include "../../../csrc/cuda/gae.cuh"
#include "../../../csrc/cuda/mixture.cuh"
#include "../../../csrc/cuda/parts.cuh"
#include "../../../csrc/cuda/policy_loss.cuh"
#include "../../../csrc/cuda/scale.cuh"
#include "../../../csrc/cuda/tail.cuh"

using namespace kl_kernels;

struct SmallLaunch {
  static constexpr int kThreads = 64, kUnroll = 2, kUnrollWithoutRef = 4, kBlocksPerSm = 1,
                       kBlocksPerSmForAny = 1;
  static constexpr bool kFastLoop = true;
  static constexpr int kPart = 2048;  // two double tiles
  static constexpr int kScaleBlocks = 3;
};

struct SmallPolicyLossLaunch {
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

extern "C" {

int64_t host_scratch_bytes(const Rows* rows) { return forward_scratch_bytes<SmallLaunch>(*rows); }

int host_forward(const Rows* rows, const Logits* policy, const Logits* reference,
                 const Outputs* outputs, const RewardParams* shape, void* scratch) {
  return launch_forward<SmallLaunch>(*rows, *policy, *reference, *outputs, *shape, scratch,
                                     nullptr);
}

int host_fold_tail(const Rows* rows, const Logits* policy, const SkippedIds* skipped,
                   const Outputs* outputs, void* scratch) {
  return launch_tail<SmallLaunch>(*rows, *policy, *skipped, *outputs, scratch, nullptr);
}

int host_finish_parts(const PartStates* parts, const bool* mask, const Outputs* outputs) {
  return launch_finish_parts(*parts, mask, *outputs, nullptr);
}

int host_backward(const Rows* rows, const Logits* policy, const Logits* reference,
                  const Saved* saved, const GradLogits* grad_logits) {
  return launch_backward<SmallLaunch>(*rows, *policy, *reference, *saved, *grad_logits, nullptr);
}

int64_t host_mix_scratch_bytes(const Rows* rows) { return mix_scratch_bytes<SmallLaunch>(*rows); }

int host_mix(const Rows* rows, const Logits* policy, const Logits* reference,
             const FinishedRows* of, const MixtureOutputs* outputs, void* scratch) {
  return launch_mix<SmallLaunch>(*rows, *policy, *reference, *of, *outputs, scratch, nullptr);
}

int host_mix_backward(const Rows* rows, const Logits* policy, const Logits* reference,
                      const FinishedRows* of, const SavedMixture* saved,
                      const GradLogits* grad_logits) {
  return launch_mix_backward<SmallLaunch>(*rows, *policy, *reference, *of, *saved, *grad_logits,
                                          nullptr);
}

// The GPU that the kernels believe to run on: the shared memory of a block and of an SM, in bytes,
// and the SMs of a group (GPC); 0: no clusters.
void host_device(int shared_per_block, int shared_per_sm, int sms_per_group) {
  int* const attributes = cuda_on_host::device_attributes;
  attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = shared_per_block;
  attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor] = shared_per_sm;
  attributes[cudaDevAttrReservedSharedMemoryPerBlock] = 1024;
  attributes[cudaDevAttrClusterLaunch] = sms_per_group > 0;
  cuda_on_host::sms_per_group = sms_per_group > 0 ? sms_per_group : 16;
}

// Over how many blocks the kernels for a GPU keep a bfloat16 or a float32 row; 0: nowhere.
int host_blocks_per_row(int64_t vocab_size, bool float32, bool with_reference) {
  using Policy = PolicyLossLaunch::Resident;
  SharedMemory memory;
  shared_memory(memory);
  const auto n_parts = [&](auto element) {
    using T = decltype(element);
    const auto split = [&](auto reference) {
      constexpr bool kHasRef = decltype(reference)::value;
      return resident_split<Policy, T, kHasRef>(vocab_size, memory, [](const Split& split) {
        const auto bytes = static_cast<int>(resident_bytes<Policy, T, kHasRef>(split));
        return cuda_on_host::clusters_per_group(bytes, split.n_parts);
      });
    };
    return with_reference ? split(std::true_type{}).n_parts : split(std::false_type{}).n_parts;
  };
  return static_cast<int>(float32 ? n_parts(float{}) : n_parts(__nv_bfloat16{}));
}

int host_blocks_of_last_cluster() { return cuda_on_host::blocks_of_last_cluster; }

int host_policy_loss(const Rows* rows, const Logits* policy, const Logits* reference,
                     const PolicyLossTokens* tokens, const PolicyLossParams* shape,
                     double temperature, const GradLogits* grad_logits, float* terms) {
  return launch_policy_loss<SmallPolicyLossLaunch>(*rows, *policy, *reference, *tokens, *shape,
                                                   temperature, *grad_logits, terms, nullptr);
}

int host_scale(const Rows* rows, const GradLogits* gradient, Dtype dtype, const float* factor) {
  return launch_scale<SmallLaunch>(*rows, *gradient, dtype, factor, nullptr);
}

int host_gae(const float* rewards, const float* values, const bool* mask, int64_t n_batch,
             int64_t n_tokens, double gamma, double lam, bool skip_masked,
             const int64_t* cu_seqlens, float* advantages, float* returns) {
  return launch_gae(rewards, values, mask, n_batch, n_tokens, gamma, lam, skip_masked, cu_seqlens,
                    advantages, returns, nullptr);
}
}
