// The operators of kl_kernels/schemas.py for the CPU; the schemas themselves are defined in Python
// (kl_kernels/backends/compiled.py), this library only implements them.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "gae.h"
#include "gradient_rows.h"
#include "jsd.h"
#include "parallel.h"
#include "policy_loss.h"
#include "tensors.h"

namespace kl_kernels {
namespace {

Tensor fold_part(const Tensor& logits_tensor, const std::optional<Tensor>& ref_logits_tensor,
                 const Tensor& token_ids, const std::optional<Tensor>& mask, double temperature,
                 double ref_temperature, std::optional<double> softcap,
                 std::optional<double> ref_softcap) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  std::optional<Logits> ref_logits;
  if (ref_logits_tensor) {
    ref_logits.emplace(*ref_logits_tensor, "ref_logits", ref_temperature, ref_softcap);
    check(logits.same_shape(*ref_logits), "ref_logits has to have the shape of logits");
  }
  const Tokens tokens(token_ids, mask, logits, Vocabulary::part);
  const int64_t n_rows = logits.n_rows();
  const int64_t n_fields = ref_logits ? kStateFields : kStateFieldsWithoutRef;
  Tensor state = torch::stable::new_empty(
      logits_tensor, {n_fields, logits.n_batch(), logits.n_tokens()}, ScalarType::Float);
  float* const data = float_data(state);
  for_each_row(n_rows, 2 * logits.vocab_size(), [&](int64_t row) {
    double fields[kStateFields] = {};
    if (tokens.counts(row)) {
      const Row reference = ref_logits ? ref_logits->row(row) : kNoReference;
      double tx, ty;
      const RowState<double> found = row_kernels().fold(logits.row(row), reference,
                                                        logits.vocab_size(), tokens[row], &tx, &ty);
      const RowState<double> s = as_saved(found);
      const double all[kStateFields] = {
          s.anchor,  s.sums.sx, s.sums.ex, tx - (s.anchor - found.anchor),        s.ref_anchor,
          s.sums.sy, s.sums.rk, s.sums.fk, ty - (s.ref_anchor - found.ref_anchor)};
      std::copy(all, all + kStateFields, fields);
    }
    for (int64_t i = 0; i < n_fields; ++i) data[i * n_rows + row] = float(fields[i]);
  });
  return state;
}

std::tuple<Tensor, Tensor, Tensor> token_stats(const Tensor& logits_tensor, const Tensor& token_ids,
                                               const std::optional<Tensor>& mask,
                                               double temperature, std::optional<double> softcap) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  const Tokens tokens(token_ids, mask, logits);
  Tensor logprob = per_token(logits_tensor), entropy = per_token(logits_tensor);
  States states(logits_tensor);
  float *logprob_data = float_data(logprob), *entropy_data = float_data(entropy);
  const RowKernels& kernels = row_kernels();
  for_each_row(logits.n_rows(), logits.vocab_size(), [&](int64_t row) {
    if (!tokens.counts(row)) {
      logprob_data[row] = entropy_data[row] = 0;
      states.set(row, 0, 0);
      return;
    }
    double tx, ty;
    const RowState<double> state =
        kernels.fold(logits.row(row), kNoReference, logits.vocab_size(), tokens[row], &tx, &ty);
    const Finished<double> f = finish(state.sums, tx, ty);
    logprob_data[row] = float(f.logprob);
    entropy_data[row] = float(f.entropy);
    const RowState<double> saved = within_reach(as_saved(state));
    states.set(row, saved.anchor, saved.sums.sx);
  });
  return {logprob, entropy, states.tensor()};
}

// Outputs of token_kl and kl_rewards for every row; `epilogue(row, finished)` adds to that.
struct KlOutputs {
  explicit KlOutputs(const Tensor& logits)
      : logprob(per_token(logits)),
        ref_logprob(per_token(logits)),
        kl(per_token(logits)),
        forward_kl(per_token(logits)),
        entropy(per_token(logits)),
        policy_states(logits),
        ref_states(logits) {}

  Tensor logprob, ref_logprob, kl, forward_kl, entropy;
  States policy_states, ref_states;
};

template <class Epilogue>
KlOutputs fold_rows(const Tensor& logits_tensor, const Logits& logits, const Logits& ref_logits,
                    const Tokens& tokens, const Epilogue& epilogue) {
  check(logits.same_shape(ref_logits), "ref_logits has to have the shape of logits");
  KlOutputs out(logits_tensor);
  float* const logprob = float_data(out.logprob);
  float* const ref_logprob = float_data(out.ref_logprob);
  float* const kl = float_data(out.kl);
  float* const forward_kl = float_data(out.forward_kl);
  float* const entropy = float_data(out.entropy);
  const RowKernels& kernels = row_kernels();
  for_each_row(logits.n_rows(), 2 * logits.vocab_size(), [&](int64_t row) {
    Finished<float> f{};
    RowState<double> saved{};
    if (tokens.counts(row)) {
      double tx, ty;
      const RowState<double> state = kernels.fold(logits.row(row), ref_logits.row(row),
                                                  logits.vocab_size(), tokens[row], &tx, &ty);
      f = to_float(finish(state.sums, tx, ty));
      saved = keep_ratio(within_reach(as_saved(state)), f);
    }
    logprob[row] = f.logprob;
    ref_logprob[row] = f.ref_logprob;
    kl[row] = f.kl;
    forward_kl[row] = f.forward_kl;
    entropy[row] = f.entropy;
    out.policy_states.set(row, saved.anchor, saved.sums.sx);
    out.ref_states.set(row, saved.ref_anchor, saved.sums.sy);
    epilogue(row, f);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_kl(
    const Tensor& logits_tensor, const Tensor& ref_logits_tensor, const Tensor& token_ids,
    const std::optional<Tensor>& mask, double temperature, double ref_temperature,
    std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  const Logits ref_logits(ref_logits_tensor, "ref_logits", ref_temperature, ref_softcap);
  const Tokens tokens(token_ids, mask, logits);
  const KlOutputs out =
      fold_rows(logits_tensor, logits, ref_logits, tokens, [](int64_t, const Finished<float>&) {});
  return {out.logprob,
          out.ref_logprob,
          out.kl,
          out.forward_kl,
          out.entropy,
          out.policy_states.tensor(),
          out.ref_states.tensor()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_rewards(
    const Tensor& logits_tensor, const Tensor& ref_logits_tensor, const Tensor& token_ids,
    const Tensor& mask, const Tensor& scores, const Tensor& score_index, double kl_coef,
    int64_t estimator, std::optional<double> kl_clip, double temperature, double ref_temperature,
    std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  const Logits ref_logits(ref_logits_tensor, "ref_logits", ref_temperature, ref_softcap);
  const Tokens tokens(token_ids, mask, logits);
  const float* const score_data =
      data_of<float>(scores, "scores", ScalarType::Float, logits.n_batch());
  const int64_t* const index_data =
      data_of<int64_t>(score_index, "score_index", ScalarType::Long, logits.n_batch());
  Tensor rewards = per_token(logits_tensor), correction = per_token(logits_tensor);
  float *reward_data = float_data(rewards), *correction_data = float_data(correction);
  const float bound = float(kl_clip.value_or(INFINITY));
  const KlOutputs out = fold_rows(
      logits_tensor, logits, ref_logits, tokens, [&](int64_t row, const Finished<float>& f) {
        ShapedReward shaped{};
        if (tokens.counts(row))
          shaped = reward_epilogue(f, float(kl_coef), Estimator(estimator), bound);
        reward_data[row] = shaped.reward;
        correction_data[row] = shaped.advantage_correction;
      });
  for (int64_t b = 0; b < logits.n_batch(); ++b) {
    const int64_t at = index_data[b];
    if (at >= 0 && at < logits.n_tokens()) reward_data[b * logits.n_tokens() + at] += score_data[b];
  }
  return {rewards,
          correction,
          out.logprob,
          out.ref_logprob,
          out.kl,
          out.forward_kl,
          out.entropy,
          out.policy_states.tensor(),
          out.ref_states.tensor()};
}

struct Saved {
  PerToken grad_logprob, grad_kl, grad_forward_kl, grad_entropy;
  PerToken policy_state, ref_state, kl, entropy;
};

// A row none of whose KL gradients is asked for does not read its reference.
void backward_rows(const Logits& logits, const Logits* ref_logits, const Tokens& tokens,
                   const Saved& saved, double temperature, Vocabulary vocabulary,
                   GradientRows& gradients) {
  const int64_t n_rows = logits.n_rows();
  for_each_row(n_rows, 2 * logits.vocab_size(), [&](int64_t row) {
    if (!tokens.counts(row)) {
      gradients.set_zero(row);
      return;
    }
    const Upstream<double> upstream{saved.grad_logprob[row], saved.grad_kl[row],
                                    saved.grad_forward_kl[row], saved.grad_entropy[row]};
    const Row policy = logits.row(row);
    const Row reference = asks_for_kl(upstream) ? ref_logits->row(row) : kNoReference;
    RowStatistics row_is{
        anchored<double>(saved.policy_state[row], saved.policy_state[n_rows + row]),
        anchored<double>(saved.ref_state[row], saved.ref_state[n_rows + row]), saved.kl[row],
        saved.entropy[row]};
    // The saved sums are floats, too coarse here: fold a whole row again.
    if (vocabulary == Vocabulary::whole && row_is.need_float64(reference.logits != nullptr)) {
      double tx, ty;
      const RowState<double> s =
          row_kernels().fold(policy, reference, logits.vocab_size(), tokens[row], &tx, &ty);
      row_is = RowStatistics::of(s, finish(s.sums, tx, ty));
    }
    gradients.write(row, policy, reference, tokens[row], upstream, row_is, temperature, vocabulary);
  });
}

void token_stats_backward(const std::optional<Tensor>& grad_logprob,
                          const std::optional<Tensor>& grad_entropy, const Tensor& logits_tensor,
                          const Tensor& token_ids, const std::optional<Tensor>& mask,
                          const Tensor& policy_state, const Tensor& entropy, double temperature,
                          std::optional<double> softcap, bool part, const Tensor& grad_logits) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  const Vocabulary vocabulary = part ? Vocabulary::part : Vocabulary::whole;
  const Tokens tokens(token_ids, mask, logits, vocabulary);
  GradientRows gradients(grad_logits, logits);
  const int64_t n = logits.n_rows();
  const PerToken none(std::nullopt, "", 0);
  const Saved saved{
      {grad_logprob, "grad_logprob", n},     none, none, {grad_entropy, "grad_entropy", n},
      {policy_state, "policy_state", 2 * n}, none, none, {entropy, "entropy", n}};
  backward_rows(logits, nullptr, tokens, saved, temperature, vocabulary, gradients);
}

void token_kl_backward(const std::optional<Tensor>& grad_logprob,
                       const std::optional<Tensor>& grad_kl,
                       const std::optional<Tensor>& grad_forward_kl,
                       const std::optional<Tensor>& grad_entropy, const Tensor& logits_tensor,
                       const Tensor& ref_logits_tensor, const Tensor& token_ids,
                       const std::optional<Tensor>& mask, const Tensor& policy_state,
                       const Tensor& ref_state, const Tensor& kl, const Tensor& entropy,
                       double temperature, double ref_temperature, std::optional<double> softcap,
                       std::optional<double> ref_softcap, bool part, const Tensor& grad_logits) {
  const Logits logits(logits_tensor, "logits", temperature, softcap);
  const Logits ref_logits(ref_logits_tensor, "ref_logits", ref_temperature, ref_softcap);
  check(logits.same_shape(ref_logits), "ref_logits has to have the shape of logits");
  const Vocabulary vocabulary = part ? Vocabulary::part : Vocabulary::whole;
  const Tokens tokens(token_ids, mask, logits, vocabulary);
  GradientRows gradients(grad_logits, logits);
  const int64_t n = logits.n_rows();
  const Saved saved{{grad_logprob, "grad_logprob", n},
                    {grad_kl, "grad_kl", n},
                    {grad_forward_kl, "grad_forward_kl", n},
                    {grad_entropy, "grad_entropy", n},
                    {policy_state, "policy_state", 2 * n},
                    {ref_state, "ref_state", 2 * n},
                    {kl, "kl", n},
                    {entropy, "entropy", n}};
  backward_rows(logits, &ref_logits, tokens, saved, temperature, vocabulary, gradients);
}

void scale_gradient(const Tensor& gradient, const Tensor& factor) {
  const float by = *data_of<float>(factor, "factor", ScalarType::Float, 1);
  if (by == 1) return;
  const Logits rows(gradient, "gradient", 1, std::nullopt);
  for_each_row(rows.n_rows(), rows.vocab_size(),
               [&](int64_t row) { row_kernels().scale(rows.row(row), rows.vocab_size(), by); });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                               double gamma, double lam, bool skip_masked) {
  const int64_t n_batch = rewards.size(0), n_tokens = rewards.size(1), n = n_batch * n_tokens;
  const float* const reward_data = data_of<float>(rewards, "rewards", ScalarType::Float, n);
  const float* const value_data = data_of<float>(values, "values", ScalarType::Float, n);
  const bool* const mask_data = data_of<bool>(mask, "mask", ScalarType::Bool, n);
  Tensor advantages = per_token(rewards), returns = per_token(rewards);
  float *advantage_data = float_data(advantages), *return_data = float_data(returns);
  for_each_row(n_batch, std::max<int64_t>(1, n_tokens), [&](int64_t b) {
    const int64_t at = b * n_tokens;
    gae_sequence(reward_data + at, value_data + at, mask_data + at, n_tokens, gamma, lam,
                 skip_masked, advantage_data + at, return_data + at);
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace kl_kernels

STABLE_TORCH_LIBRARY_IMPL(kl_kernels_cpu, CPU, m) {
  m.impl("fold_part", TORCH_BOX(&kl_kernels::fold_part));
  m.impl("token_stats", TORCH_BOX(&kl_kernels::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&kl_kernels::token_stats_backward));
  m.impl("token_kl", TORCH_BOX(&kl_kernels::token_kl));
  m.impl("token_kl_backward", TORCH_BOX(&kl_kernels::token_kl_backward));
  m.impl("token_jsd", TORCH_BOX(&kl_kernels::token_jsd));
  m.impl("mixture_part", TORCH_BOX(&kl_kernels::mixture_part));
  m.impl("token_jsd_backward", TORCH_BOX(&kl_kernels::token_jsd_backward));
  m.impl("kl_rewards", TORCH_BOX(&kl_kernels::kl_rewards));
  m.impl("policy_loss", TORCH_BOX(&kl_kernels::policy_loss));
  m.impl("scale_gradient", TORCH_BOX(&kl_kernels::scale_gradient));
  m.impl("gae", TORCH_BOX(&kl_kernels::gae));
}
