#include "forward.cuh"
#include "parts.cuh"
#include "tail.cuh"

namespace kl_kernels {

int64_t scratch_bytes(const Rows& rows) { return forward_scratch_bytes<LaunchPolicy>(rows); }

cudaError_t forward(const Rows& rows, const Logits& policy, const Logits& reference,
                    const Outputs& outputs, const RewardParams& params, void* scratch,
                    cudaStream_t stream) {
  return launch_forward<LaunchPolicy>(rows, policy, reference, outputs, params, scratch, stream);
}

cudaError_t fold_tail(const Rows& rows, const Logits& policy, const SkippedIds& skipped,
                      const Outputs& outputs, void* scratch, cudaStream_t stream) {
  return launch_tail<LaunchPolicy>(rows, policy, skipped, outputs, scratch, stream);
}

cudaError_t finish_parts(const PartStates& parts, const bool* mask, const Outputs& outputs,
                         cudaStream_t stream) {
  return launch_finish_parts(parts, mask, outputs, stream);
}

}  // namespace kl_kernels
