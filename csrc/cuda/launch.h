// How the vocabulary is spread over threads and blocks: all of the launch policy, with its reasons.
#pragma once

#include <type_traits>
#include <utility>

#include "operators.h"

namespace kl_kernels {

// A lane owns 8 neighbouring logits: one 16-byte load in 16-bit types, two in float32.
constexpr int kLanes = 8;

struct LaunchPolicy {
  static constexpr int kThreads = 256;

  // Loads of 8 logits (of each model) in flight per thread. By Little's law 4.8 TB/s over 132 SMs,
  // at 800 ns, needs 29 kB in flight per SM. Four blocks of 256 threads with two 16-byte loads of
  // two models each have 64 kB, so half of the threads may be computing; so have four of one model.
  static constexpr int kUnroll = 2, kUnrollWithoutRef = 4;
  static constexpr bool kFastLoop = true;

  // At most 64 registers, so that four blocks fit: the 1024 threads counted on above. Softcaps are
  // bound by their tanh, not by memory, and would spill.
  static constexpr int kBlocksPerSm = 4, kBlocksPerSmForAny = 2;

  // A row is split into parts of at most this many logits, a block each. The split depends on V
  // alone, so that a row's numbers never depend on the rest of the batch. Four parts of V = 128k
  // let 64 rows give each of an H200's SMs two blocks, 32 kB in flight; with two parts it would be
  // one, and 16 of the 29 kB that are needed. Of smaller parts, starting and finishing would be a
  // larger share: about 400 instructions a thread, beside 13 for each of its 128 pairs of logits.
  static constexpr int kPart = 32768;

  // scale_gradient: six blocks for each of an H200's SMs, as many as fit.
  static constexpr int kScaleBlocks = 792;
};

// policy_loss, which looks at a row twice. Predictions, for an H200 (36 bytes per ns and SM), a
// pair of bfloat16 rows and V = 128256; nothing here is measured yet.
struct PolicyLossLaunch {
  // A row in the shared memory of a cluster. A block of 8 holds 64 kB, all of it in flight at once:
  // with three blocks 192 kB per SM, where 29 are needed. It moves 96 kB, which take 2.7 us of the
  // SM's share of the memory. For about 3 us it moves nothing: 0.8 until the first bytes come,
  // 0.4 to merge its states, 0.3 at the barrier and reading the other blocks' states, 1.5 to finish
  // the row in float64 (one warp, some 740 instructions, 180 of them in float64). Three blocks hide
  // up to 5.4 us of that: the memory stays busy, and each block spends 3 of 8.1 us, 37 %, waiting.
  // Two blocks (V = 151936) hide 3.1 us, just enough. A single block (V = 262144, 131 kB) would
  // hide nothing, and with the gradient's instructions not overlapped, either, about half of the
  // bandwidth would be lost: such rows take clusters of 16, and again three blocks of 66 kB per SM.
  // Instructions: 13 per pair to fold, 10.6 for its gradient, 0.5 to fetch: 1.7 us per block and
  // SM. Rows that are not aligned take 5 more to fold: 2 us.
  struct Resident {
    static constexpr int kThreads = 256, kUnroll = 1, kUnrollWithoutRef = 1, kBlocksPerSm = 3;
    static constexpr bool kFastLoop = true;
  };

  // A row that does not fit is read again, and had better be in the L2 cache still (50 MB). So few
  // rows are under way: one wide block per SM, which is what its more than 42 registers a thread
  // ensure, and 8 blocks per row. 16 pairs of float32 rows with V = 262144 are 34 MB; without
  // clusters it would be 132 rows and 277 MB, of which little is found again.
  // The guarded loop alone: its 5 instructions more per pair are few beside the memory's time, and
  // with both of them sm_100's 80 registers would spill.
  struct Reread {
    static constexpr int kThreads = 768, kUnroll = 1, kUnrollWithoutRef = 1, kBlocksPerSm = 1;
    static constexpr bool kFastLoop = false;
  };
  // Softcaps and types known at run time only need more registers, and are bound by instructions.
  struct RereadAny {
    static constexpr int kThreads = 512, kUnroll = 1, kUnrollWithoutRef = 1, kBlocksPerSm = 1;
    static constexpr bool kFastLoop = false;
  };
};

// How a row is split: parts of about the same size, each but the last of whole tiles. (Blocks are
// numbered in 32 bits, and so are rows; offsets are not.)
struct Split {
  uint32_t n_parts;
  int part_size;
};

template <class Policy>
Split split_of(int64_t vocab_size) {
  constexpr int64_t kTile = Policy::kThreads * kLanes;
  static_assert(Policy::kPart % kTile == 0, "parts are whole tiles");
  const auto divide_up = [](int64_t n, int64_t by) { return (n + by - 1) / by; };
  const int64_t n_parts = divide_up(vocab_size, Policy::kPart);
  const int64_t part_size = divide_up(vocab_size, n_parts * kTile) * kTile;
  return {static_cast<uint32_t>(divide_up(vocab_size, part_size)), static_cast<int>(part_size)};
}

struct Grid {
  int64_t n_blocks;
  int n_threads;
  int shared_bytes = 0;             // dynamic shared memory of a block
  uint32_t blocks_per_cluster = 1;  // divides n_blocks
  // The most that a launch of the kernel may ask for on this device. Always the same: the limit is
  // the kernel's, not the launch's, and another thread may be about to launch it for another V.
  int most_shared_bytes = shared_bytes;
};

// Clusters of 8 blocks are portable: a kernel need not say that it knows of them, as it must
// for 16. Whether one finds room in a group of SMs (GPC), which differ in size, `clusters_at_once`
// says.
constexpr uint32_t kPortableCluster = 8, kLargestCluster = 16;

template <class... Parameters>
cudaError_t configure(void (*kernel)(Parameters...), const Grid& grid, cudaLaunchConfig_t& config,
                      cudaLaunchAttribute& cluster) {
  config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.n_blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.n_threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  cluster = {};
  if (grid.blocks_per_cluster > 1) {  // GPUs before sm_90 know no such attribute
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = grid.blocks_per_cluster;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  cudaError_t error = cudaSuccess;
  const auto allow = [&](cudaFuncAttribute attribute, int value) {
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
  };
  if (grid.shared_bytes > 0)
    allow(cudaFuncAttributeMaxDynamicSharedMemorySize, grid.most_shared_bytes);
  if (grid.blocks_per_cluster > kPortableCluster)
    allow(cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  return error;
}

// How many such clusters run at once, if the current device has nothing else to do. By its and the
// kernel's constants alone: microseconds, and no synchronisation.
template <class... Parameters>
int clusters_at_once(void (*kernel)(Parameters...), const Grid& grid) {
  cudaLaunchConfig_t config;
  cudaLaunchAttribute cluster;
  int n = 0;
  if (configure(kernel, grid, config, cluster) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&n, reinterpret_cast<const void*>(kernel), &config) ==
          cudaSuccess)
    return n;
  (void)cudaGetLastError();  // or the next launch would be taken to have failed
  return 0;
}

// Launches `kernel` unless there is nothing to do. (A function, where <<<>>> is syntax: tests run
// this very code as plain C++.)
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream,
                   Arguments&&... arguments) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (grid.n_blocks == 0) return cudaSuccess;
  if (grid.n_blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config;
  cudaLaunchAttribute cluster;
  const cudaError_t error = configure(kernel, grid, config, cluster);
  if (error != cudaSuccess) return error;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
}

}  // namespace kl_kernels
