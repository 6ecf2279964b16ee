// finish_parts: the states of all parts of a row, such as those of several ranks, to its numbers.
#pragma once

#include "forward.cuh"

namespace kl_kernels {

// One thread per row. Whether the parts tile the vocabulary, a block finds out together.
__global__ void finish_parts_kernel(PartStates parts, const bool* mask, Outputs out) {
  bool misplaced = false;
  for (int64_t i = threadIdx.x; i < parts.n_parts; i += blockDim.x)
    misplaced |= !parts.begins_right(i);
  const bool tiled = !__syncthreads_or(misplaced);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= parts.n_rows) return;
  WholeRow whole{};  // 0 where masked
  if (mask == nullptr || mask[row]) whole = whole_row(parts, row, tiled);
  write(out.logprob, row, whole.finished.logprob);
  write(out.ref_logprob, row, whole.finished.ref_logprob);
  write(out.kl, row, whole.finished.kl);
  write(out.forward_kl, row, whole.finished.forward_kl);
  write(out.entropy, row, whole.finished.entropy);
  write(out.policy_state, row, whole.saved.anchor);
  write(out.policy_state, parts.n_rows + row, whole.saved.sums.sx);
  write(out.ref_state, row, whole.saved.ref_anchor);
  write(out.ref_state, parts.n_rows + row, whole.saved.sums.sy);
}

inline cudaError_t launch_finish_parts(const PartStates& parts, const bool* mask,
                                       const Outputs& out, cudaStream_t stream) {
  constexpr int kThreads = 128;
  return launch(finish_parts_kernel, {(parts.n_rows + kThreads - 1) / kThreads, kThreads}, stream,
                parts, mask, out);
}

}  // namespace kl_kernels
