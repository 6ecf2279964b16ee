// token_stats, token_kl, kl_rewards and fold_part: one row's logits to all of its numbers, reading
// each once.
//
//   fold_kernel    one block per part of a row; where a row is one part, it finishes it, too
//   finish_kernel  one thread per row: merges the parts, in order, and finishes
#pragma once

#include "fold.cuh"

namespace kl_kernels {

__device__ inline void write(float* to, int64_t at, double value) {
  if (to != nullptr) to[at] = static_cast<float>(value);
}

// The KL's share of the reward, and the score's where this is its place (which need not count).
__device__ inline void write_rewards(const Rows& rows, const Outputs& out,
                                     const RewardParams& params, uint32_t row,
                                     const ShapedReward& shaped) {
  if (out.rewards == nullptr) return;
  const int64_t b = row / rows.n_tokens, t = row % rows.n_tokens;
  out.rewards[row] = shaped.reward + (params.score_index[b] == t ? params.scores[b] : 0.0f);
  out.advantage_correction[row] = shaped.advantage_correction;
}

// The state of logits that may be a part of their vocabulary; tx and ty are the token's.
__device__ inline void write_part_state(const Rows& rows, bool has_ref, float* to, uint32_t row,
                                        const RowState<double>& s, double tx, double ty) {
  if (to == nullptr) return;
  if (rows.token_ids[row] == kNoToken) tx = ty = INFINITY;
  const double fields[kStateFields] = {s.anchor,  s.sums.sx, s.sums.ex, tx, s.ref_anchor,
                                       s.sums.sy, s.sums.rk, s.sums.fk, ty};
#pragma unroll
  for (int i = 0; i < kStateFields; ++i) {
    if (has_ref || i < kStateFieldsWithoutRef) write(to, i * rows.n_rows + row, fields[i]);
  }
}

// A row that counts for nothing is 0 everywhere.
__device__ inline void write_masked(const Rows& rows, bool has_ref, const Outputs& out,
                                    const RewardParams& params, uint32_t row) {
  float* const outputs[] = {out.logprob, out.ref_logprob, out.kl, out.forward_kl, out.entropy};
  for (float* output : outputs) write(output, row, 0);
  float* const states[] = {out.policy_state, out.ref_state};
  for (float* state : states) {
    write(state, row, 0);
    write(state, rows.n_rows + row, 0);
  }
  const int n_fields = has_ref ? kStateFields : kStateFieldsWithoutRef;
  for (int i = 0; i < n_fields; ++i) write(out.part_state, i * rows.n_rows + row, 0);
  write_rewards(rows, out, params, row, {0.0f, 0.0f});
}

// In float64: one thread's work per row, and the difference of two logarithms cancels as p nears q.
__device__ inline void write_finished(const Rows& rows, const Logits& policy,
                                      const Logits& reference, const Outputs& out,
                                      const RewardParams& params, uint32_t row,
                                      const RowState<double>& found) {
  const RowState<double> s = within_reach(found);
  const int64_t token = token_of(rows, row);
  const double x = token_logit<Any>(policy, rows, row, token);
  const double tx = from_anchor(x, static_cast<double>(policy.k), s.anchor);
  double ty = 0;
  if (reference.data != nullptr) {
    const double y = token_logit<Any>(reference, rows, row, token);
    ty = from_anchor(y, static_cast<double>(reference.k), s.ref_anchor);
  }
  const Finished<double> f = finish(s.sums, tx, ty);
  write(out.logprob, row, f.logprob);
  write(out.ref_logprob, row, f.ref_logprob);
  write(out.kl, row, f.kl);
  write(out.forward_kl, row, f.forward_kl);
  write(out.entropy, row, f.entropy);
  write(out.policy_state, row, s.anchor);
  write(out.policy_state, rows.n_rows + row, s.sums.sx);
  write(out.ref_state, row, s.ref_anchor);
  write(out.ref_state, rows.n_rows + row, s.sums.sy);
  write_part_state(rows, reference.data != nullptr, out.part_state, row, found, tx, ty);
  write_rewards(rows, out, params, row,
                reward_epilogue(rounded(f), params.kl_coef, params.estimator, params.kl_clip));
}

// CUDA kernels

template <class Policy, class T, bool kHasRef>
__global__ void __launch_bounds__(Policy::kThreads, kBlocks<Policy, T>)
    fold_kernel(Rows rows, Split split, Logits policy, Logits reference, Outputs out,
                RewardParams params,
                RowState<float>* parts) {  // parts: [B T, n_parts], nullptr where that is 1
  __shared__ WarpScratch<Policy::kThreads> scratch_of_warps;
  const SplitOfRow place = split_of_row(blockIdx.x, rows, split);
  const uint32_t row = place.row;
  const int64_t token = token_of(rows, row);  // beside the mask, not after it
  if (!counts(rows, row)) {                   // the whole block returns
    if (parts == nullptr && threadIdx.x == 0) write_masked(rows, kHasRef, out, params, row);
    return;
  }
  const auto part = part_of<Row<T>, kHasRef>(rows, policy, reference, place);
  const auto probe_token = [&] {
    const float x = token_logit<T>(policy, rows, row, token);
    const float y = kHasRef ? token_logit<T>(reference, rows, row, token) : x;
    return token_extent<Policy>(part, x, y);
  };
  const RowState<float> s =
      part.aligned() ? fold_part<Policy, true, kHasRef>(part, probe_token, scratch_of_warps)
                     : fold_part<Policy, false, kHasRef>(part, probe_token, scratch_of_warps);
  if (threadIdx.x != 0) return;
  if (parts == nullptr)
    write_finished(rows, policy, reference, out, params, row, widened(s));
  else
    parts[blockIdx.x] = s;
}

__global__ void finish_kernel(Rows rows, Split split, Logits policy, Logits reference, Outputs out,
                              RewardParams params, const RowState<float>* parts) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows.n_rows) return;
  if (!counts(rows, row)) {
    write_masked(rows, reference.data != nullptr, out, params, row);
    return;
  }
  parts += static_cast<int64_t>(row) * split.n_parts;
  RowState<double> s = empty_state<double>();
  for (uint32_t i = 0; i < split.n_parts; ++i) s = merge(s, widened(parts[i]));
  write_finished(rows, policy, reference, out, params, row, s);
}

// Launchers

template <class Policy>
int64_t forward_scratch_bytes(const Rows& rows) {
  const Split split = split_of<Policy>(rows.vocab_size);
  return split.n_parts == 1 ? 0 : rows.n_rows * split.n_parts * sizeof(RowState<float>);
}

inline cudaError_t launch_finish(const Rows& rows, const Split& split, const Logits& policy,
                                 const Logits& reference, const Outputs& out,
                                 const RewardParams& params, const RowState<float>* parts,
                                 cudaStream_t stream) {
  constexpr int kThreads = 128;
  return launch(finish_kernel, {(rows.n_rows + kThreads - 1) / kThreads, kThreads}, stream, rows,
                split, policy, reference, out, params, parts);
}

template <class Policy>
cudaError_t launch_forward(const Rows& rows, const Logits& policy, const Logits& reference,
                           const Outputs& out, const RewardParams& params, void* scratch,
                           cudaStream_t stream) {
  const Split split = split_of<Policy>(rows.vocab_size);
  const bool whole = split.n_parts == 1;
  RowState<float>* const parts = whole ? nullptr : static_cast<RowState<float>*>(scratch);
  const cudaError_t error = with_element_type(policy, reference, [&](auto element) {
    using T = decltype(element);
    const auto kernel =
        reference.data == nullptr ? fold_kernel<Policy, T, false> : fold_kernel<Policy, T, true>;
    return launch(kernel, {rows.n_rows * split.n_parts, Policy::kThreads}, stream, rows, split,
                  policy, reference, out, params, parts);
  });
  if (error != cudaSuccess || whole) return error;
  return launch_finish(rows, split, policy, reference, out, params, parts, stream);
}

}  // namespace kl_kernels
