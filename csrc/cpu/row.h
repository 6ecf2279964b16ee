// Kernels of the CPU backend, one row (token) at a time, on raw pointers; no torch below this line.
#pragma once

#include <stdint.h>

#include "../common/dtype.h"
#include "../common/mixture.h"
#include "../common/row_math.h"

namespace kl_kernels {

// One model's logits of one row, and how to read them.
struct Row {
  const void* logits;  // [V]
  Dtype dtype;
  float k;        // log2(e) / temperature
  float softcap;  // 0: none
  // Ascending, [n_skipped]: tokens that are folded as if the row did not hold them.
  const int64_t* skipped_ids = nullptr;
  int64_t n_skipped = 0;
};

// Whether only float64 arithmetic is to measure from an anchor. Floats are 1/32 apart there, and so
// far may the largest logit lie from one: equal logits are rounded alike then, which adds up.
KL_HOST_DEVICE bool is_far(double anchor) {
  constexpr double kFarAnchor = 0x1p18;
  return !(fabs(anchor) <= kFarAnchor);
}

// Constants of a row's gradient, besides the logits.
struct RowGradient {
  bool in_float64;    // its numbers are too large for float arithmetic
  double anchor, sx;  // of the policy, as saved
  double ref_anchor;
  Coefficients<double> c;
  double own;        // the sampled token's own share, g_logprob / temperature
  double tolerance;  // of the sum over the vocabulary, which should be 0; of a part, +inf
};

// A row's states, both finished, and the mixture that they are compared with.
struct FinishedPair {
  Anchored<double> policy, ref;
  double beta;
  bool far;  // logits are measured from these anchors in float64
};

// One instruction set's kernels. A missing reference has logits == nullptr.
struct RowKernels {
  // The row's state, and its token's position from the anchors in *token_tx and *token_ty (+inf for
  // kNoToken).
  RowState<double> (*fold)(const Row& policy, const Row& reference, int64_t vocab_size,
                           int64_t token, double* token_tx, double* token_ty);
  // Writes grad_logits [V] in the policy's dtype.
  void (*backward)(const Row& policy, const Row& reference, int64_t vocab_size, int64_t token,
                   const RowGradient& gradient, void* grad_logits);
  // A row's divergence from the mixture: of a part of its vocabulary, that part's share.
  MixtureSums<double> (*mix)(const Row& policy, const Row& reference, int64_t vocab_size,
                             const FinishedPair& of);
  // Writes the gradient of it into grad_logits [V], which may be the policy's logits.
  void (*mix_backward)(const Row& policy, const Row& reference, int64_t vocab_size,
                       const FinishedPair& of, const MixtureSlope<double>& slope,
                       void* grad_logits);
  // Multiplies a row by a number, where it lies.
  void (*scale)(const Row& row, int64_t vocab_size, float factor);
};

// One object file each (row.cpp); all but the last exist on x86-64 only.
extern const RowKernels row_kernels_v4;    // AVX-512
extern const RowKernels row_kernels_v3;    // AVX2, FMA, F16C
extern const RowKernels row_kernels_base;  // what every machine of the architecture has

// The kernels in use: the best the machine can run, unless select_instruction_set chose others.
const RowKernels& row_kernels();

}  // namespace kl_kernels

// The name of the instruction set in use: "x86-64-v4", "x86-64-v3" or "base". A name as argument
// selects it for all later calls, "best" the best; nullptr is returned where the machine lacks it.
// Exported so that tests can compare them (not thread-safe; nullptr only asks).
extern "C" __attribute__((visibility("default"))) const char* kl_kernels_instruction_set(
    const char* select);
