#include "mixture.cuh"

namespace kl_kernels {

int64_t mix_scratch_bytes(const Rows& rows) { return mix_scratch_bytes<LaunchPolicy>(rows); }

cudaError_t mix(const Rows& rows, const Logits& policy, const Logits& reference,
                const FinishedRows& of, const MixtureOutputs& outputs, void* scratch,
                cudaStream_t stream) {
  return launch_mix<LaunchPolicy>(rows, policy, reference, of, outputs, scratch, stream);
}

cudaError_t mix_backward(const Rows& rows, const Logits& policy, const Logits& reference,
                         const FinishedRows& of, const SavedMixture& saved,
                         const GradLogits& grad_logits, cudaStream_t stream) {
  return launch_mix_backward<LaunchPolicy>(rows, policy, reference, of, saved, grad_logits, stream);
}

}  // namespace kl_kernels
