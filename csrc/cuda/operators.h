// Operators of the CUDA kernels, on raw device pointers; no torch below this line.
//
// Every function enqueues on `stream` and returns at once; it may be captured in a CUDA graph.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/epilogues.h"
#include "../common/parts.h"
#include "runtime.h"

namespace kl_kernels {

// One model's logits [B, T, V], neighbouring logits neighbours in memory, and how to read them.
struct Logits {
  const void* data;  // nullptr: no such model
  Dtype dtype;
  int64_t stride_b, stride_t;  // in logits; any, also 0
  float k;                     // log2(e) / temperature
  float softcap;               // 0: none
};

// The policy and, if there is one, the reference.
struct Models {
  Logits policy, reference;
};

// The rows (tokens) of one call.
struct Rows {
  int64_t n_rows;    // B T
  int64_t n_tokens;  // T
  int64_t vocab_size;
  const int64_t* token_ids;  // [B, T]; nullptr: none is sampled
  const bool* mask;          // [B, T]; nullptr: all rows count
};

// Where a gradient [B, T, V] goes, in the logits' dtype; it may be the logits' own memory.
struct GradLogits {
  void* data;  // nullptr: not wanted
  int64_t stride_b, stride_t;
};

// Outputs of the forward pass, each [B, T] or nullptr where it is not wanted. A state is [2, B,
// T]: the anchors, then the sums; of a part [kStateFields or kStateFieldsWithoutRef, B, T].
struct Outputs {
  float *logprob, *ref_logprob, *kl, *forward_kl, *entropy;
  float *policy_state, *ref_state;
  float *rewards, *advantage_correction;
  float* part_state;
};

// Inputs of the backward pass, each [B, T]; upstream gradients may be nullptr. Without a gradient
// of either KL, the reference's state and kl are not read.
struct Saved {
  const float *grad_logprob, *grad_kl, *grad_forward_kl, *grad_entropy;
  const float *policy_state, *ref_state;  // [2, B, T]
  const float *kl, *entropy;
  double temperature;  // the policy's
  bool part;           // of a vocabulary: a token may be kNoToken
};

// Per-token inputs of policy_loss besides the logits, each [B, T] or nullptr.
struct PolicyLossTokens {
  const float* old_logprobs;  // nullptr: the ratio is 1
  const float *advantages, *token_weights;
  const float* importance_weights;  // nullptr: 1
  const float* ref_logprobs;        // nullptr: neither k2 nor k3 is asked for
};

// Rows whose states are known, [2, B, T] each, and the reference's weight in the mixture.
struct FinishedRows {
  const float *policy_state, *ref_state;
  double beta;
};

// Outputs of `mix`, each [B, T].
struct MixtureOutputs {
  float *jsd, *kl;  // kl: KL(policy || mixture)
  bool part;        // of a vocabulary: its share of both
};

// Further inputs of the gradient of the divergence, each [B, T].
struct SavedMixture {
  const float *grad_jsd, *mixture_kl;
  double temperature;  // the policy's
};

// Bytes of scratch memory that `forward` and `fold_tail` need.
int64_t scratch_bytes(const Rows& rows);

// token_stats (no reference), token_kl, kl_rewards (rewards wanted) and fold_part in one.
cudaError_t forward(const Rows& rows, const Logits& policy, const Logits& reference,
                    const Outputs& outputs, const RewardParams& params, void* scratch,
                    cudaStream_t stream);

// The states of rows without some of their tokens, into `outputs.part_state`.
cudaError_t fold_tail(const Rows& rows, const Logits& policy, const SkippedIds& skipped,
                      const Outputs& outputs, void* scratch, cudaStream_t stream);

// The outputs of rows, rewards not among them, from the states of their parts. mask: [B, T] or
// nullptr.
cudaError_t finish_parts(const PartStates& parts, const bool* mask, const Outputs& outputs,
                         cudaStream_t stream);

// token_stats_backward and token_kl_backward in one.
cudaError_t backward(const Rows& rows, const Logits& policy, const Logits& reference,
                     const Saved& saved, const GradLogits& grad_logits, cudaStream_t stream);

// Bytes of scratch memory that `mix` needs.
int64_t mix_scratch_bytes(const Rows& rows);

// token_jsd, once `forward` has given the states, and mixture_part.
cudaError_t mix(const Rows& rows, const Logits& policy, const Logits& reference,
                const FinishedRows& of, const MixtureOutputs& outputs, void* scratch,
                cudaStream_t stream);

cudaError_t mix_backward(const Rows& rows, const Logits& policy, const Logits& reference,
                         const FinishedRows& of, const SavedMixture& saved,
                         const GradLogits& grad_logits, cudaStream_t stream);

// The terms [kPolicyLossTerms, B, T] of every token's loss, and the loss's gradient where wanted.
// `temperature` is the policy's.
cudaError_t policy_loss(const Rows& rows, const Logits& policy, const Logits& reference,
                        const PolicyLossTokens& tokens, const PolicyLossParams& params,
                        double temperature, const GradLogits& grad_logits, float* terms,
                        cudaStream_t stream);

// Multiplies a gradient in place by *factor, which lies in device memory; 1 costs nothing.
cudaError_t scale(const Rows& rows, const GradLogits& gradient, Dtype dtype, const float* factor,
                  cudaStream_t stream);

// All [B, T]; with cu_seqlens, [B + 1], all [T] of B packed sequences.
cudaError_t gae_rows(const float* rewards, const float* values, const bool* mask, int64_t n_batch,
                     int64_t n_tokens, double gamma, double lam, bool skip_masked,
                     const int64_t* cu_seqlens, float* advantages, float* returns,
                     cudaStream_t stream);

}  // namespace kl_kernels
