// The second look at rows that are finished: their divergence from the mixture of policy and
// reference, and the gradient of that.
//
//   mix_kernel          one block per part of a row; where a row is one part, it finishes it, too
//   add_parts_kernel    one thread per row: adds the parts, in order, and finishes
//   mix_backward_kernel one block per part of a row
//
// Logits are read from memory again, or from the L2 cache where a batch is small enough.
#pragma once

#include "../common/mixture.h"
#include "block.cuh"
#include "part.cuh"

namespace kl_kernels {

// How a row is measured, and what its gradient is made of.
struct MixtureRow {
  float anchor, ref_anchor;
  Mixture<float> mixture;
  MixtureSlope<float> slope;
};

__device__ inline MixtureRow mixture_row(const Rows& rows, const FinishedRows& of, uint32_t row) {
  return {of.policy_state[row],
          of.ref_state[row],
          mixture_of<float>(of.policy_state[rows.n_rows + row], of.ref_state[rows.n_rows + row],
                            of.beta),
          {0, 0}};
}

__device__ __forceinline__ Beside<float> beside(const MixtureRow& r, float tx, float ky, float y) {
  return beside_mixture<ScalarFunctions>(r.mixture, tx, from_anchor(y, ky, r.ref_anchor));
}

// The sums over all threads; right in thread 0 alone.
template <int kThreads>
__device__ MixtureSums<float> add_block(MixtureSums<float> s,
                                        MixtureSums<float> (&of_warps)[kThreads / kWarp]) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int by = kWarp / 2; by > 0; by /= 2) {
    s.jsd += __shfl_down_sync(kAllLanes, s.jsd, by);
    s.kl += __shfl_down_sync(kAllLanes, s.kl, by);
  }
  if (lane == 0) of_warps[warp] = s;
  __syncthreads();  // without it thread 0 would add sums that are not there yet
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / kWarp; ++i) {
      s.jsd += of_warps[i].jsd;
      s.kl += of_warps[i].kl;
    }
  }
  return s;
}

// This thread's share of a part, not yet in nats.
template <class Policy, bool kAligned, class P>
__device__ MixtureSums<float> mix_part(const P& part, const MixtureRow& r) {
  MixtureSums<float> s{0, 0};
  const auto absorb = [&](float x, float y) {
    const float tx = from_anchor(x, part.kx, r.anchor);
    const Beside<float> b = beside(r, tx, part.ky, y);
    s.jsd += exp2f(b.larger) * b.jsd;
    s.kl += exp2f(tx) * b.policy;  // one instruction less than with b.p
  };
  const auto each_vector = [&](int, const auto& xs, const auto& ys) {
    float x[kLanes], y[kLanes];
    unpack(xs, x);
    unpack(ys, y);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) absorb(x[j], y[j]);
  };
  for_each<Policy, kAligned>(part, each_vector, [&](int, float x, float y) { absorb(x, y); });
  return s;
}

// In float64; NaN stays NaN.
__device__ inline void write_mixture(const Rows& rows, const FinishedRows& of,
                                     const MixtureOutputs& out, uint32_t row, double jsd,
                                     double kl) {
  const double sx = of.policy_state[rows.n_rows + row], sy = of.ref_state[rows.n_rows + row];
  const MixtureSums<double> s =
      finish_mixture(jsd, kl, sx, mixture_of<double>(sx, sy, of.beta).shift);
  out.jsd[row] = static_cast<float>(out.part ? s.jsd : at_least_zero(s.jsd));
  out.kl[row] = static_cast<float>(s.kl);
}

__device__ inline void write_masked_mixture(const MixtureOutputs& out, uint32_t row) {
  out.jsd[row] = out.kl[row] = 0;
}

// CUDA kernels

template <class Policy, class T>
__global__ void __launch_bounds__(Policy::kThreads, kBlocks<Policy, T>)
    mix_kernel(Rows rows, Split split, Logits policy, Logits reference, FinishedRows of,
               MixtureOutputs out,
               MixtureSums<float>* parts) {  // parts: [B T, n_parts], nullptr where that is 1
  const SplitOfRow place = split_of_row(blockIdx.x, rows, split);
  const uint32_t row = place.row;
  if (!counts(rows, row)) {  // the whole block returns
    if (parts == nullptr && threadIdx.x == 0) write_masked_mixture(out, row);
    return;
  }
  __shared__ MixtureRow of_row;
  __shared__ MixtureSums<float> of_warps[Policy::kThreads / kWarp];
  if (threadIdx.x == 0) {
    const MixtureRow computed = mixture_row(rows, of, row);
    of_row = computed;
  }
  __syncthreads();  // without it the others would use a mixture that is not there yet
  const MixtureRow r = of_row;
  const auto part = part_of<Row<T>, true>(rows, policy, reference, place);
  const MixtureSums<float> mine =
      part.aligned() ? mix_part<Policy, true>(part, r) : mix_part<Policy, false>(part, r);
  const MixtureSums<float> s = add_block<Policy::kThreads>(mine, of_warps);
  if (threadIdx.x != 0) return;
  if (parts == nullptr)
    write_mixture(rows, of, out, row, s.jsd, s.kl);
  else
    parts[blockIdx.x] = s;
}

__global__ void add_parts_kernel(Rows rows, Split split, FinishedRows of, MixtureOutputs out,
                                 const MixtureSums<float>* parts) {
  const uint32_t row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows.n_rows) return;
  if (!counts(rows, row)) return write_masked_mixture(out, row);
  parts += static_cast<int64_t>(row) * split.n_parts;
  double jsd = 0, kl = 0;
  for (uint32_t i = 0; i < split.n_parts; ++i) {
    jsd += parts[i].jsd;
    kl += parts[i].kl;
  }
  write_mixture(rows, of, out, row, jsd, kl);
}

template <class Policy, bool kAligned, class P, class T>
__device__ void write_mixture_gradient(const P& part, const MixtureRow& r, const GradRow<T>& grad) {
  const auto gradient = [&](float x, float y) {
    const float tx = from_anchor(x, part.kx, r.anchor);
    return exp2f(tx) * (r.slope.a + r.slope.b * beside(r, tx, part.ky, y).policy);
  };
  const auto each_vector = [&](int i, const auto& xs, const auto& ys) {
    float x[kLanes], y[kLanes], g[kLanes];
    unpack(xs, x);
    unpack(ys, y);
#pragma unroll
    for (int j = 0; j < kLanes; ++j) g[j] = gradient(x[j], y[j]);
    grad.put_vector(i, g, x);
  };
  for_each<Policy, kAligned>(part, each_vector,
                             [&](int i, float x, float y) { grad.put(i, gradient(x, y), x); });
}

template <class Policy, class T>
__global__ void __launch_bounds__(Policy::kThreads, kBlocks<Policy, T>)
    mix_backward_kernel(Rows rows, Split split, Logits policy, Logits reference, FinishedRows of,
                        SavedMixture saved, GradLogits grad_logits) {
  const SplitOfRow place = split_of_row(blockIdx.x, rows, split);
  const uint32_t row = place.row;
  const auto grad = grad_row_of<T>(rows, policy, grad_logits, place);
  if (!counts(rows, row)) return write_zeros<Policy>(grad, place.size);
  __shared__ MixtureRow of_row;
  if (threadIdx.x == 0) {
    MixtureRow computed = mixture_row(rows, of, row);
    const MixtureSlope<double> slope =
        mixture_slope(saved.grad_jsd[row], saved.mixture_kl[row],
                      of.policy_state[rows.n_rows + row], of.beta, saved.temperature);
    computed.slope = {static_cast<float>(slope.a), static_cast<float>(slope.b)};
    of_row = computed;
  }
  __syncthreads();  // without it the others would use a slope that is not there yet
  const MixtureRow r = of_row;
  const auto part = aligned_to(grad, part_of<Row<T>, true>(rows, policy, reference, place));
  if (part.aligned())
    write_mixture_gradient<Policy, true>(part, r, grad);
  else
    write_mixture_gradient<Policy, false>(part, r, grad);
}

// Launchers

template <class Policy>
int64_t mix_scratch_bytes(const Rows& rows) {
  const Split split = split_of<Policy>(rows.vocab_size);
  return split.n_parts == 1 ? 0 : rows.n_rows * split.n_parts * sizeof(MixtureSums<float>);
}

template <class Policy>
cudaError_t launch_mix(const Rows& rows, const Logits& policy, const Logits& reference,
                       const FinishedRows& of, const MixtureOutputs& out, void* scratch,
                       cudaStream_t stream) {
  const Split split = split_of<Policy>(rows.vocab_size);
  const bool whole = split.n_parts == 1;
  MixtureSums<float>* const parts = whole ? nullptr : static_cast<MixtureSums<float>*>(scratch);
  const cudaError_t error = with_element_type(policy, reference, [&](auto element) {
    return launch(mix_kernel<Policy, decltype(element)>,
                  {rows.n_rows * split.n_parts, Policy::kThreads}, stream, rows, split, policy,
                  reference, of, out, parts);
  });
  if (error != cudaSuccess || whole) return error;
  constexpr int kThreads = 128;
  return launch(add_parts_kernel, {(rows.n_rows + kThreads - 1) / kThreads, kThreads}, stream, rows,
                split, of, out, parts);
}

template <class Policy>
cudaError_t launch_mix_backward(const Rows& rows, const Logits& policy, const Logits& reference,
                                const FinishedRows& of, const SavedMixture& saved,
                                const GradLogits& grad_logits, cudaStream_t stream) {
  const Split split = split_of<Policy>(rows.vocab_size);
  return with_element_type(policy, reference, [&](auto element) {
    return launch(mix_backward_kernel<Policy, decltype(element)>,
                  {rows.n_rows * split.n_parts, Policy::kThreads}, stream, rows, split, policy,
                  reference, of, saved, grad_logits);
  });
}

}  // namespace kl_kernels
