// policy_loss: a row's statistics, its loss and its gradient. The loss's gradient with respect to
// the statistics is known as soon as they are, so the second look at the logits is one at memory
// close by: shared memory, where the row fits into that of a cluster, or else the L2 cache.
//
//   fold      each block its part of the row, into a state
//   exchange  the blocks' states, through distributed shared memory; everyone finishes the row
//   gradient  each block of its part, from the same logits
#pragma once

#include "cluster.cuh"
#include "fold.cuh"
#include "gradient.cuh"
#include "smem_row.cuh"

namespace kl_kernels {

// Shared memory of a block. (Not static __shared__: tests run the blocks of a
// cluster side by side on host threads.)
template <int kThreads>
struct alignas(16) BlockScratch {
  WarpScratch<kThreads> scratch_of_warps;
  RowState<float> state;
  RowGradient gradient;
};

__device__ inline void write_terms(const Rows& rows, uint32_t row, const PolicyLoss& loss,
                                   float* terms) {  // [kPolicyLossTerms, B T]
#pragma unroll
  for (int i = 0; i < kPolicyLossTerms; ++i) terms[i * rows.n_rows + row] = loss.terms[i];
}

// Inputs that are not given read as 0: log-probabilities are the policy's own then.
__device__ inline PolicyLossInputs inputs_of(const PolicyLossTokens& tokens, uint32_t row) {
  const auto value = [row](const float* values) { return values == nullptr ? 0 : values[row]; };
  return {value(tokens.old_logprobs), tokens.advantages[row], tokens.token_weights[row],
          tokens.importance_weights == nullptr ? 1.0f : tokens.importance_weights[row],
          value(tokens.ref_logprobs)};
}

// In float64, like every finish; x and y are the token's logits.
template <bool kHasRef>
__device__ RowGradient finish_loss(const RowState<double>& found, const Logits& policy,
                                   const Logits& reference, double x, double y,
                                   const PolicyLossTokens& tokens, PolicyLossInputs inputs,
                                   const PolicyLossParams& params, double over_temperature,
                                   PolicyLoss& loss) {
  const RowState<double> s = within_reach(found);
  const double tx = from_anchor(x, static_cast<double>(policy.k), s.anchor);
  const double ty = kHasRef ? from_anchor(y, static_cast<double>(reference.k), s.ref_anchor) : 0;
  const Anchored<double> own = anchored(s.anchor, s.sums.sx);
  Anchored<double> ref{0, 1, 0};
  if (kHasRef) ref = anchored(s.ref_anchor, s.sums.sy);
  Finished<double> f = finish(s.sums, own.ln_of_sum, ref.ln_of_sum, tx, ty);
  if (!kHasRef) f.kl = 0;  // of a policy alone, it is undefined
  const float logprob = static_cast<float>(f.logprob);
  if (tokens.old_logprobs == nullptr) inputs.old_logprob = logprob;
  if (tokens.ref_logprobs == nullptr) inputs.ref_logprob = logprob;
  loss = policy_loss_epilogue(rounded(f), inputs, params);
  Upstream<double> g = loss.gradient;
  if (!kHasRef) g.kl = 0;
  return row_gradient(g, own, ref, f.kl, f.entropy, over_temperature);
}

template <class Policy, Order kOrder, class R, bool kHasRef, class T>
__device__ void write_loss_gradient(const Part<R, kHasRef>& part, const RowGradient& r,
                                    const GradRow<T>& grad, int64_t token) {
  constexpr Terms kTerms = kHasRef ? Terms::kl : Terms::policy;
  part.aligned() ? write_gradient<Policy, true, kTerms, kOrder>(part, r, grad, token)
                 : write_gradient<Policy, false, kTerms, kOrder>(part, r, grad, token);
}

// CUDA kernels

// One cluster per row, one block per part of it.
template <class Policy, class T, bool kHasRef, bool kResident>
__global__ void __launch_bounds__(Policy::kThreads, Policy::kBlocksPerSm)
    policy_loss_kernel(Rows rows, Split split, Logits policy, Logits reference,
                       PolicyLossTokens tokens, PolicyLossParams params, double over_temperature,
                       GradLogits grad_logits,
                       float* terms) {  // terms: [kPolicyLossTerms, B, T]
  using Memory = BlockScratch<Policy::kThreads>;
  Memory& memory = *static_cast<Memory*>(dynamic_shared_memory());
  const Cluster cluster(split.n_parts);
  const SplitOfRow place = split_of_row(blockIdx.x, rows, split);
  const uint32_t row = place.row;
  const bool wants_gradient = grad_logits.data != nullptr;
  const bool writes_terms = place.part == 0 && threadIdx.x == 0;
  const int64_t token = rows.token_ids[row];  // not queued behind the row
  if (!counts(rows, row)) {                   // all blocks of the cluster return
    if (writes_terms) write_terms(rows, row, {}, terms);
    if (wants_gradient)
      write_zeros<Policy>(grad_row_of<T>(rows, policy, grad_logits, place), place.size);
    return;
  }
  const PolicyLossInputs inputs = inputs_of(tokens, row);  // there when the row is

  // All of these are read before anybody writes a gradient, which may lie over the logits.
  constexpr Cache kCache = kResident ? Cache::stream : Cache::keep;
  const auto part = part_of<Row<T, kCache>, kHasRef>(rows, policy, reference, place);
  const auto in_smem = [&] {
    if constexpr (kResident)
      return copy_to_smem<Policy>(part, &memory + 1, split.part_size);
    else
      return part;
  }();
  const float x = token_logit<T>(policy, rows, row, token);
  const float y = kHasRef ? token_logit<T>(reference, rows, row, token) : x;
  const auto probe_token = [&] { return token_extent<Policy>(part, x, y); };
  const RowState<float> state =
      part.aligned()
          ? fold_part<Policy, true, kHasRef>(in_smem, probe_token, memory.scratch_of_warps)
          : fold_part<Policy, false, kHasRef>(in_smem, probe_token, memory.scratch_of_warps);
  if (threadIdx.x == 0) memory.state = state;
  cluster.arrive();
  cluster.wait();  // without it blocks would merge states that are not there yet
  if (threadIdx.x < kWarp) {
    PolicyLoss loss;
    const RowGradient r =
        finish_loss<kHasRef>(merge_cluster(cluster, memory.state), policy, reference, x, y, tokens,
                             inputs, params, over_temperature, loss);
    if (threadIdx.x == 0) memory.gradient = r;
    if (writes_terms) write_terms(rows, row, loss, terms);
  }
  __syncthreads();  // without it the others would use coefficients that are not there yet
  cluster.arrive_relaxed();
  if (wants_gradient) {
    const RowGradient r = memory.gradient;  // in registers, not read again for every logit
    const auto grad = grad_row_of<T>(rows, policy, grad_logits, place);
    // The logits read last are the likeliest to be in the L2 cache still.
    constexpr Order kOrder = kResident ? Order::forwards : Order::backwards;
    const auto again = [&] {
      if constexpr (kResident)
        return aligned_to(grad, Part<SmemRow<T>, kHasRef>(in_smem));
      else
        return aligned_to(grad, part_of<Row<T>, kHasRef>(rows, policy, reference, place));
    }();
    const int64_t here = token - place.begin;
    if (r.terms == Terms::none)
      write_zeros<Policy>(grad, place.size);
    else if (!kHasRef || r.terms == Terms::policy)
      write_loss_gradient<Policy, kOrder>(without_reference(again), r, grad, here);
    else
      write_loss_gradient<Policy, kOrder>(again, r, grad, here);
  }
  cluster.wait();  // without it a block might be gone while others still read its state
}

// Launchers

// Limits of the current device, which decide where a row is kept.
struct SharedMemory {
  int per_block, per_sm, reserved;  // bytes; `reserved` of every block for itself
  int clusters;                     // whether blocks form clusters
};

inline cudaError_t shared_memory(SharedMemory& memory) {
  // (The runtime knows these by heart: nanoseconds each, and no synchronisation.)
  int device;
  cudaError_t error = cudaGetDevice(&device);
  const auto ask = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, device);
  };
  ask(memory.per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  ask(memory.per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  ask(memory.reserved, cudaDevAttrReservedSharedMemoryPerBlock);
  ask(memory.clusters, cudaDevAttrClusterLaunch);
  return error;
}

// A row over `n_parts` blocks, in whole lines of the cache.
inline Split shares_of(int64_t vocab_size, int64_t n_parts) {
  constexpr int64_t kLine = 64;
  return {static_cast<uint32_t>(n_parts),
          static_cast<int>((vocab_size + n_parts * kLine - 1) / (n_parts * kLine) * kLine)};
}

template <class Policy, class T, bool kHasRef>
int64_t resident_bytes(const Split& split) {
  constexpr int kModels = kHasRef ? 2 : 1;
  return sizeof(BlockScratch<Policy::kThreads>) + kModels * SmemRow<T>::bytes(split.part_size);
}

// The split of a row that stays on chip, by V, dtype, reference and device alone; n_parts is 0 if
// it cannot. The smallest cluster that leaves room for three blocks per SM: while one of them waits
// for its row or for the others, two keep the memory busy. Otherwise for two. Otherwise the largest
// with which `rows_at_once`, which is asked for a split, are the most: 0 of a cluster that the
// device has no room for, whose launch would fail. (No architecture tells how large its groups of
// SMs are, and how many of them are left of a chip.)
template <class Policy, class T, bool kHasRef, class RowsAtOnce>
Split resident_split(int64_t vocab_size, const SharedMemory& memory,
                     const RowsAtOnce& rows_at_once) {
  const auto fits = [&](const Split& split, int blocks_per_sm) {
    const int64_t bytes = resident_bytes<Policy, T, kHasRef>(split);
    const bool all_have_some = (split.n_parts - 1) * int64_t{split.part_size} < vocab_size;
    return all_have_some && bytes <= memory.per_block &&
           blocks_per_sm * (bytes + memory.reserved) <= memory.per_sm;
  };
  const int64_t portable = memory.clusters ? kPortableCluster : 1;
  for (const int blocks_per_sm : {3, 2}) {
    for (int64_t n = 1; n <= portable; n *= 2) {
      const Split split = shares_of(vocab_size, n);
      if (fits(split, blocks_per_sm) && (n == 1 || rows_at_once(split) > 0)) return split;
    }
  }
  Split best{0, 0};
  int most = 0;
  for (int64_t n = memory.clusters ? kLargestCluster : 1; n >= 1; n /= 2) {
    if (n < portable && best.n_parts > 0) break;  // of small clusters the largest that runs
    const Split split = shares_of(vocab_size, n);
    const int rows = !fits(split, 1) ? 0 : n == 1 ? 1 : rows_at_once(split);
    if (rows > 0 && rows >= most) {
      best = split;
      most = rows;
    }
  }
  return best;
}

// The split of a row that is read twice: over as many blocks as have a tile each, so that few rows
// are under way and the L2 cache still has them at the second look; no cluster that does not run.
template <class Policy, class RowsAtOnce>
Split reread_split(int64_t vocab_size, const SharedMemory& memory, const RowsAtOnce& rows_at_once) {
  int64_t n = memory.clusters ? kPortableCluster : 1;
  while (n > 1 && vocab_size < n * Policy::kThreads * kLanes) n /= 2;
  while (n > 1 && rows_at_once(shares_of(vocab_size, n)) == 0) n /= 2;
  return shares_of(vocab_size, n);
}

template <class Launch>
cudaError_t launch_policy_loss(const Rows& rows, const Logits& policy, const Logits& reference,
                               const PolicyLossTokens& tokens, const PolicyLossParams& params,
                               double temperature, const GradLogits& grad_logits, float* terms,
                               cudaStream_t stream) {
  SharedMemory memory;
  const cudaError_t error = shared_memory(memory);
  if (error != cudaSuccess) return error;
  const auto run = [&](auto kernel, const Grid& grid, const Split& split) {
    return launch(kernel, grid, stream, rows, split, policy, reference, tokens, params,
                  1 / temperature, grad_logits, terms);
  };
  return with_element_type(policy, reference, [&](auto element) {
    using T = decltype(element);
    const auto choose = [&](auto with_reference) {
      constexpr bool kHasRef = decltype(with_reference)::value;
      if constexpr (!std::is_same_v<T, Any>) {
        using Policy = typename Launch::Resident;
        const auto kernel = policy_loss_kernel<Policy, T, kHasRef, true>;
        const auto grid = [&](const Split& split, int64_t n_rows) {
          const int64_t bytes = resident_bytes<Policy, T, kHasRef>(split);
          return Grid{n_rows * split.n_parts, Policy::kThreads, static_cast<int>(bytes),
                      split.n_parts, memory.per_block};
        };
        const Split split = resident_split<Policy, T, kHasRef>(
            rows.vocab_size, memory,
            [&](const Split& split) { return clusters_at_once(kernel, grid(split, 1)); });
        if (split.n_parts > 0) return run(kernel, grid(split, rows.n_rows), split);
      }
      using Policy = std::conditional_t<std::is_same_v<T, Any>, typename Launch::RereadAny,
                                        typename Launch::Reread>;
      const auto kernel = policy_loss_kernel<Policy, T, kHasRef, false>;
      const auto grid = [](const Split& split, int64_t n_rows) {
        return Grid{n_rows * split.n_parts, Policy::kThreads,
                    sizeof(BlockScratch<Policy::kThreads>), split.n_parts};
      };
      const Split split = reread_split<Policy>(rows.vocab_size, memory, [&](const Split& split) {
        return clusters_at_once(kernel, grid(split, 1));
      });
      return run(kernel, grid(split, rows.n_rows), split);
    };
    return reference.data == nullptr ? choose(std::false_type{}) : choose(std::true_type{});
  });
}

}  // namespace kl_kernels
