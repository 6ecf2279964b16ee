// How the vocabulary is spread over threads and blocks: all of the launch policy, with its reasons.
#pragma once

#include <utility>

#include "operators.h"

namespace kl_kernels {

// A lane owns 8 neighbouring logits: one 16-byte load in 16-bit types, two in float32.
constexpr int kLanes = 8;

struct LaunchPolicy {
  static constexpr int kThreads = 256;

  // Loads of 8 logits (of each model) in flight per thread. By Little's law 4.8 TB/s over 132 SMs,
  // at 800 ns, needs 29 kB in flight per SM. Four blocks of 256 threads with two 16-byte loads of
  // two models each have 64 kB, so half of the threads may be computing.
  static constexpr int kUnroll = 2;

  // At most 64 registers, so that four blocks fit: the 1024 threads counted on above. Softcaps are
  // bound by their tanh, not by memory, and would spill.
  static constexpr int kBlocksPerSm = 4, kBlocksPerSmForAny = 2;

  // A row is split into parts of this many logits, a block each. The split depends on V alone, so
  // that a row's numbers never depend on the rest of the batch. Parts this small let 33 rows of
  // V = 128k fill an H200; parts much smaller would mostly start and finish.
  static constexpr int kPart = 32768;
};

template <class Policy>
KL_HOST_DEVICE int64_t n_parts(int64_t vocab_size) {
  return (vocab_size + Policy::kPart - 1) / Policy::kPart;
}

// Launches `kernel` unless there is nothing to do. (A function, where <<<>>> is syntax: tests run
// this very code as plain C++.)
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t n_blocks, int n_threads,
                   cudaStream_t stream, Arguments&&... arguments) {
  constexpr int64_t kMostBlocks = 0x7fffffff;
  if (n_blocks == 0) return cudaSuccess;
  if (n_blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(n_blocks));
  config.blockDim = dim3(static_cast<unsigned>(n_threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
}

}  // namespace kl_kernels
