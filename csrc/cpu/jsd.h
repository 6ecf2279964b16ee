// token_jsd and what belongs to it: a row's statistics, and a second look while it is in the cache.
#pragma once

#include "gradient_rows.h"
#include "parallel.h"

namespace kl_kernels {

// Both models, and which of their rows count.
struct MixtureRows : Models {
  const bool* mask;

  MixtureRows(const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask_tensor,
              double temperature, double ref_temperature, std::optional<double> softcap,
              std::optional<double> ref_softcap)
      : Models(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap),
        mask(mask_of(mask_tensor, logits)) {}

  bool counts(int64_t row) const { return mask == nullptr || mask[row]; }

  template <class Work>
  void for_each(const Work& work) const {
    for_each_row(n_rows(), 4 * vocab_size(), work);
  }
};

inline FinishedPair finished_pair(const Anchored<double>& policy, const Anchored<double>& ref,
                                  double beta) {
  return {policy, ref, beta, is_far(policy.anchor) || is_far(ref.anchor)};
}

// Finished rows, as they are saved.
struct SavedPairs {
  PerToken policy, ref;
  int64_t n_rows;
  double beta;

  SavedPairs(const Tensor& policy_state, const Tensor& ref_state, const Tensor& logits,
             double of_beta)
      : policy{state_of(policy_state, "policy_state", logits)},
        ref{state_of(ref_state, "ref_state", logits)},
        n_rows(n_rows_of(logits)),
        beta(of_beta) {}

  FinishedPair operator[](int64_t row) const {
    FinishedPair of = finished_pair(anchored<double>(policy[row], policy[n_rows + row]),
                                    anchored<double>(ref[row], ref[n_rows + row]), beta);
    if (of.far) of.policy = normalised(of.policy), of.ref = normalised(of.ref);
    return of;
  }

 private:
  // Measured from where its weights sum to about 1: the row's maximum may lie 64 from a far anchor
  // that was saved as a float.
  static Anchored<double> normalised(const Anchored<double>& of) {
    const double sunk = -std::nearbyint(of.ln_of_sum * kLog2e);
    return anchored(of.anchor - sunk, of.sum * std::exp2(sunk));
  }
};

namespace bindings {

inline std::tuple<Tensor, Tensor, Tensor, Tensor> token_jsd(
    const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& mask, double beta,
    double temperature, double ref_temperature, std::optional<double> softcap,
    std::optional<double> ref_softcap) {
  const MixtureRows rows(logits, ref_logits, mask, temperature, ref_temperature, softcap,
                         ref_softcap);
  Tensor jsd = new_rows(logits), mixture_kl = new_rows(logits);
  float *jsd_data = floats(jsd), *kl_data = floats(mixture_kl);
  States policy_states(logits), ref_states(logits);
  const RowKernels& kernels = row_kernels();
  const int64_t vocab_size = rows.vocab_size();
  rows.for_each([&](int64_t row) {
    RowState<double> saved{};
    MixtureSums<double> found{};
    if (rows.counts(row)) {
      const Row policy = rows.policy(row), reference = rows.reference(row);
      double tx, ty;
      const RowState<double> s = kernels.fold(policy, reference, vocab_size, kNoToken, &tx, &ty);
      saved = within_reach(as_saved(s));
      found = kernels.mix(
          policy, reference, vocab_size,
          finished_pair(anchored(s.anchor, s.sums.sx), anchored(s.ref_anchor, s.sums.sy), beta));
    }
    jsd_data[row] = float(at_least_zero(found.jsd));
    kl_data[row] = float(found.kl);
    policy_states.set(row, saved.anchor, saved.sums.sx);
    ref_states.set(row, saved.ref_anchor, saved.sums.sy);
  });
  return {jsd, mixture_kl, policy_states.tensor(), ref_states.tensor()};
}

inline Tensor mixture_part(const Tensor& logits, const Tensor& ref_logits,
                           const OptionalTensor& mask, const Tensor& policy_state,
                           const Tensor& ref_state, double beta, double temperature,
                           double ref_temperature, std::optional<double> softcap,
                           std::optional<double> ref_softcap) {
  const MixtureRows rows(logits, ref_logits, mask, temperature, ref_temperature, softcap,
                         ref_softcap);
  const SavedPairs saved(policy_state, ref_state, logits, beta);
  Tensor sums = new_rows(logits, 2);
  float* const data = floats(sums);
  rows.for_each([&](int64_t row) {
    MixtureSums<double> found{};
    if (rows.counts(row))
      found =
          row_kernels().mix(rows.policy(row), rows.reference(row), rows.vocab_size(), saved[row]);
    data[row] = float(found.jsd);
    data[rows.n_rows() + row] = float(found.kl);
  });
  return sums;
}

inline void token_jsd_backward(const Tensor& grad_jsd, const Tensor& logits,
                               const Tensor& ref_logits, const OptionalTensor& mask,
                               const Tensor& policy_state, const Tensor& ref_state,
                               const Tensor& mixture_kl, double beta, double temperature,
                               double ref_temperature, std::optional<double> softcap,
                               std::optional<double> ref_softcap, const Tensor& grad_logits) {
  const MixtureRows rows(logits, ref_logits, mask, temperature, ref_temperature, softcap,
                         ref_softcap);
  const SavedPairs saved(policy_state, ref_state, logits, beta);
  const PerToken grad{floats_of(grad_jsd, "grad_jsd", logits)};
  const PerToken kl{floats_of(mixture_kl, "mixture_kl", logits)};
  GradientRows gradients(grad_logits, rows.logits);
  rows.for_each([&](int64_t row) {
    if (!rows.counts(row) || grad[row] == 0) {
      gradients.set_zero(row);
      return;
    }
    const FinishedPair of = saved[row];
    row_kernels().mix_backward(rows.policy(row), rows.reference(row), rows.vocab_size(), of,
                               mixture_slope(grad[row], kl[row], of.policy.sum, beta, temperature),
                               gradients.at(row));
  });
}

}  // namespace bindings
}  // namespace kl_kernels
