// Rows of grad_logits, which may be the logits themselves.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cmath>
#include <cstring>
#include <vector>

#include "tensors.h"

namespace kl_kernels {

// Half the time of a backward over a fresh gradient of gigabytes can be page faults; larger pages
// mean fewer of them. Advice only: it may be ignored.
inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096;
  constexpr int64_t kWorthwhile = 4 << 20;
  if (bytes < kWorthwhile) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Whether a row's gradient depends on its reference.
inline bool asks_for_kl(const Upstream<double>& g) { return g.kl != 0 || g.forward_kl != 0; }

// Statistics that a row's gradient needs besides its logits and the upstream gradient.
struct RowStatistics {
  Anchored<double> policy, ref;  // anchors and sums of the row's state
  double kl, entropy;

  static RowStatistics of(const RowState<double>& s, const Finished<double>& f) {
    return {anchored(s.anchor, s.sums.sx), anchored(s.ref_anchor, s.sums.sy), f.kl, f.entropy};
  }

  // Whether only float64 arithmetic can take them: coefficients are as large as the KL.
  bool need_float64(bool has_ref) const {
    constexpr double kLargeKl = 1024;
    return is_far(policy.anchor) ||
           (has_ref && (is_far(ref.anchor) || (kl > kLargeKl && kl < INFINITY)));
  }
};

class GradientRows {
 public:
  GradientRows(const Tensor& tensor, const Logits& logits)
      : rows_(tensor, "grad_logits", 1, std::nullopt) {
    check_gradient(tensor, "grad_logits", logits.tensor());
    if (rows_.contiguous() && rows_.n_rows() > 0)
      advise_huge_pages(at(0), rows_.n_rows() * rows_.row_bytes());
  }

  void set_zero(int64_t row) { std::memset(at(row), 0, rows_.row_bytes()); }

  void write(int64_t row, const Row& policy, const Row& reference, int64_t token,
             const Upstream<double>& upstream, const RowStatistics& row_is, double temperature,
             Vocabulary vocabulary = Vocabulary::whole) {
    if (is_zero(upstream)) {  // a token whose clip decides: nothing to look at
      set_zero(row);
      return;
    }
    const double sx = row_is.policy.sum;
    const bool has_ref = reference.logits != nullptr, in_float64 = row_is.need_float64(has_ref);
    const Anchored<double> ref = !has_ref ? Anchored<double>{0, 1, 0}
                                 : in_float64
                                     ? row_is.ref
                                     : centred(row_is.ref, row_is.policy.ln_of_sum, row_is.kl);
    const double upstream_size = std::abs(upstream.logprob) + std::abs(upstream.kl) +
                                 std::abs(upstream.forward_kl) + std::abs(upstream.entropy);
    const RowGradient gradient{
        in_float64, row_is.policy.anchor, sx, ref.anchor,
        coefficients(upstream, row_is.policy, ref, row_is.kl, row_is.entropy, 1 / temperature),
        upstream.logprob / temperature,
        // A p of about 1 / sx is the largest: in a flat row an error is spread thin.
        vocabulary == Vocabulary::part ? INFINITY
                                       : kSumTolerance * sx * upstream_size / temperature};
    // Kernels may look at a logit again after its gradient is written.
    const bool in_place = at(row) == policy.logits;
    thread_local std::vector<char> beside;
    if (in_place) beside.resize(rows_.row_bytes());
    row_kernels().backward(policy, reference, rows_.vocab_size(), token, gradient,
                           in_place ? beside.data() : at(row));
    if (in_place) std::memcpy(at(row), beside.data(), rows_.row_bytes());
  }

  void* at(int64_t row) const { return const_cast<void*>(rows_.row(row).logits); }

 private:
  // Two float32 roundings of the upstream gradient.
  static constexpr double kSumTolerance = 1e-7;

  Logits rows_;
};

}  // namespace kl_kernels
