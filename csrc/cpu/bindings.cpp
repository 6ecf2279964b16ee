// The operators of kl_kernels/schemas.py for the CPU.
#include <tuple>

#include "../common/register.h"
#include "gae.h"
#include "gradient_rows.h"
#include "jsd.h"
#include "parallel.h"
#include "policy_loss.h"
#include "tensors.h"

namespace kl_kernels::bindings {
namespace {

// `policy(row)` is the row of `models` that is folded.
template <class Policy>
Tensor part_states(const Models& models, const Tokens& tokens, const Policy& policy) {
  const int64_t n_rows = models.n_rows();
  const int64_t n_fields = models.ref_logits ? kStateFields : kStateFieldsWithoutRef;
  Tensor state = new_rows(models.logits.tensor(), n_fields);
  float* const data = floats(state);
  for_each_row(n_rows, 2 * models.vocab_size(), [&](int64_t row) {
    double fields[kStateFields] = {};
    if (tokens.counts(row)) {
      double tx, ty;
      const RowState<double> found = row_kernels().fold(policy(row), models.reference(row),
                                                        models.vocab_size(), tokens[row], &tx, &ty);
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

Tensor fold_part(const Tensor& logits, const OptionalTensor& ref_logits, const Tensor& token_ids,
                 const OptionalTensor& mask, double temperature, double ref_temperature,
                 std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Models models(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Tokens tokens(token_ids, mask, models.logits, Vocabulary::part);
  return part_states(models, tokens, [&](int64_t row) { return models.policy(row); });
}

Tensor fold_tail(const Tensor& logits, const Tensor& token_ids, const Tensor& skipped_ids,
                 const OptionalTensor& mask, double temperature, std::optional<double> softcap) {
  const Models models(logits, std::nullopt, temperature, temperature, softcap, softcap);
  const Tokens tokens(token_ids, mask, models.logits, Vocabulary::part);
  const SkippedIds skipped = skipped_ids_of(skipped_ids, logits);
  return part_states(models, tokens, [&](int64_t row) {
    Row policy = models.policy(row);
    policy.skipped_ids = skipped.of(row);
    policy.n_skipped = skipped.per_row;
    return policy;
  });
}

std::tuple<Tensor, Tensor, Tensor> token_stats(const Tensor& logits, const Tensor& token_ids,
                                               const OptionalTensor& mask, double temperature,
                                               std::optional<double> softcap) {
  const Logits policy(logits, "logits", temperature, softcap);
  const Tokens tokens(token_ids, mask, policy);
  Tensor logprob = new_rows(logits), entropy = new_rows(logits);
  States states(logits);
  float *logprob_data = floats(logprob), *entropy_data = floats(entropy);
  const RowKernels& kernels = row_kernels();
  for_each_row(policy.n_rows(), policy.vocab_size(), [&](int64_t row) {
    if (!tokens.counts(row)) {
      logprob_data[row] = entropy_data[row] = 0;
      states.set(row, 0, 0);
      return;
    }
    double tx, ty;
    const RowState<double> state =
        kernels.fold(policy.row(row), kNoReference, policy.vocab_size(), tokens[row], &tx, &ty);
    const Finished<double> f = finish(state.sums, tx, ty);
    logprob_data[row] = float(f.logprob);
    entropy_data[row] = float(f.entropy);
    const RowState<double> saved = within_reach(as_saved(state));
    states.set(row, saved.anchor, saved.sums.sx);
  });
  return {logprob, entropy, states.tensor()};
}

using KLTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Outputs of token_kl and kl_rewards for every row; `epilogue(row, finished)` adds to that.
template <class Epilogue>
KLTensors fold_rows(const Models& models, const Tokens& tokens, const Epilogue& epilogue) {
  const Tensor& like = models.logits.tensor();
  Tensor logprob = new_rows(like), ref_logprob = new_rows(like), kl = new_rows(like);
  Tensor forward_kl = new_rows(like), entropy = new_rows(like);
  States policy_states(like), ref_states(like);
  float *logprob_data = floats(logprob), *ref_logprob_data = floats(ref_logprob);
  float *kl_data = floats(kl), *forward_kl_data = floats(forward_kl);
  float* const entropy_data = floats(entropy);
  const RowKernels& kernels = row_kernels();
  for_each_row(models.n_rows(), 2 * models.vocab_size(), [&](int64_t row) {
    Finished<float> f{};
    RowState<double> saved{};
    if (tokens.counts(row)) {
      double tx, ty;
      const RowState<double> state = kernels.fold(models.policy(row), models.reference(row),
                                                  models.vocab_size(), tokens[row], &tx, &ty);
      f = to_float(finish(state.sums, tx, ty));
      saved = keep_ratio(within_reach(as_saved(state)), f);
    }
    logprob_data[row] = f.logprob;
    ref_logprob_data[row] = f.ref_logprob;
    kl_data[row] = f.kl;
    forward_kl_data[row] = f.forward_kl;
    entropy_data[row] = f.entropy;
    policy_states.set(row, saved.anchor, saved.sums.sx);
    ref_states.set(row, saved.ref_anchor, saved.sums.sy);
    epilogue(row, f);
  });
  return {
      logprob, ref_logprob, kl, forward_kl, entropy, policy_states.tensor(), ref_states.tensor()};
}

KLTensors token_kl(const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids,
                   const OptionalTensor& mask, double temperature, double ref_temperature,
                   std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Models models(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Tokens tokens(token_ids, mask, models.logits);
  return fold_rows(models, tokens, [](int64_t, const Finished<float>&) {});
}

KLTensors finish_parts(const Tensor& states, const OptionalTensor& ranges,
                       const OptionalTensor& mask) {
  const PartStates parts = part_states_of(states, ranges);
  const int64_t n_rows = parts.n_rows;
  const bool* const counts = data_of<bool>(mask, "mask", ScalarType::Bool, n_rows, states);
  bool tiled = true;
  for (int64_t i = 0; i < parts.n_parts; ++i) tiled = tiled && parts.begins_right(i);
  Tensor logprob = new_rows_of_parts(states), ref_logprob = new_rows_of_parts(states);
  Tensor kl = new_rows_of_parts(states), forward_kl = new_rows_of_parts(states);
  Tensor entropy = new_rows_of_parts(states);
  Tensor policy_state = new_states_of_parts(states), ref_state = new_states_of_parts(states);
  float *logprob_data = floats(logprob), *ref_logprob_data = floats(ref_logprob);
  float *kl_data = floats(kl), *forward_kl_data = floats(forward_kl);
  float *entropy_data = floats(entropy), *policy_data = floats(policy_state);
  float* const ref_data = floats(ref_state);
  for_each_row(n_rows, 64 * parts.n_parts, [&](int64_t row) {  // a state is some work
    WholeRow whole{};
    if (counts == nullptr || counts[row]) whole = whole_row(parts, row, tiled);
    const Finished<float> f = to_float(whole.finished);
    logprob_data[row] = f.logprob;
    ref_logprob_data[row] = f.ref_logprob;
    kl_data[row] = f.kl;
    forward_kl_data[row] = f.forward_kl;
    entropy_data[row] = f.entropy;
    policy_data[row] = float(whole.saved.anchor);
    policy_data[n_rows + row] = float(whole.saved.sums.sx);
    ref_data[row] = float(whole.saved.ref_anchor);
    ref_data[n_rows + row] = float(whole.saved.sums.sy);
  });
  return {logprob, ref_logprob, kl, forward_kl, entropy, policy_state, ref_state};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> kl_rewards(
    const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids, const Tensor& mask,
    const Tensor& scores, const Tensor& score_index, double kl_coef, int64_t estimator,
    std::optional<double> kl_clip, double temperature, double ref_temperature,
    std::optional<double> softcap, std::optional<double> ref_softcap) {
  const Models models(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Tokens tokens(token_ids, mask, models.logits);
  Tensor rewards = new_rows(logits), correction = new_rows(logits);
  const RewardParams params =
      reward_params(scores, score_index, kl_coef, estimator, kl_clip, logits);
  float *reward_data = floats(rewards), *correction_data = floats(correction);
  const KLTensors statistics =
      fold_rows(models, tokens, [&](int64_t row, const Finished<float>& f) {
        ShapedReward shaped{};
        if (tokens.counts(row))
          shaped = reward_epilogue(f, params.kl_coef, params.estimator, params.kl_clip);
        reward_data[row] = shaped.reward;
        correction_data[row] = shaped.advantage_correction;
      });
  const int64_t n_batch = logits.size(0), n_tokens = logits.size(1);
  for (int64_t b = 0; b < n_batch; ++b) {
    const int64_t at = params.score_index[b];
    if (at >= 0 && at < n_tokens) reward_data[b * n_tokens + at] += params.scores[b];
  }
  return std::tuple_cat(std::make_tuple(rewards, correction), statistics);
}

struct Saved {
  PerToken grad_logprob, grad_kl, grad_forward_kl, grad_entropy;
  PerToken policy_state, ref_state, kl, entropy;
};

// A row none of whose KL gradients is asked for does not read its reference.
void backward_rows(const Models& models, const Tensor& token_ids, const OptionalTensor& mask,
                   const Saved& saved, double temperature, bool part, const Tensor& grad_logits) {
  const Vocabulary vocabulary = part ? Vocabulary::part : Vocabulary::whole;
  const Tokens tokens(token_ids, mask, models.logits, vocabulary);
  GradientRows gradients(grad_logits, models.logits);
  const int64_t n_rows = models.n_rows();
  for_each_row(n_rows, 2 * models.vocab_size(), [&](int64_t row) {
    if (!tokens.counts(row)) {
      gradients.set_zero(row);
      return;
    }
    const Upstream<double> upstream{saved.grad_logprob[row], saved.grad_kl[row],
                                    saved.grad_forward_kl[row], saved.grad_entropy[row]};
    const Row policy = models.policy(row);
    const Row reference = asks_for_kl(upstream) ? models.reference(row) : kNoReference;
    RowStatistics row_is{
        anchored<double>(saved.policy_state[row], saved.policy_state[n_rows + row]),
        anchored<double>(saved.ref_state[row], saved.ref_state[n_rows + row]), saved.kl[row],
        saved.entropy[row]};
    // The saved sums are floats, too coarse here: fold a whole row again.
    if (vocabulary == Vocabulary::whole && row_is.need_float64(reference.logits != nullptr)) {
      double tx, ty;
      const RowState<double> s =
          row_kernels().fold(policy, reference, models.vocab_size(), tokens[row], &tx, &ty);
      row_is = RowStatistics::of(s, finish(s.sums, tx, ty));
    }
    gradients.write(row, policy, reference, tokens[row], upstream, row_is, temperature, vocabulary);
  });
}

void token_stats_backward(const OptionalTensor& grad_logprob, const OptionalTensor& grad_entropy,
                          const Tensor& logits, const Tensor& token_ids, const OptionalTensor& mask,
                          const Tensor& policy_state, const Tensor& entropy, double temperature,
                          std::optional<double> softcap, bool part, const Tensor& grad_logits) {
  const Models models(logits, std::nullopt, temperature, temperature, softcap, softcap);
  Saved saved{};
  saved.grad_logprob = {floats_of(grad_logprob, "grad_logprob", logits)};
  saved.grad_entropy = {floats_of(grad_entropy, "grad_entropy", logits)};
  saved.policy_state = {state_of(policy_state, "policy_state", logits)};
  saved.entropy = {floats_of(entropy, "entropy", logits)};
  backward_rows(models, token_ids, mask, saved, temperature, part, grad_logits);
}

void token_kl_backward(const OptionalTensor& grad_logprob, const OptionalTensor& grad_kl,
                       const OptionalTensor& grad_forward_kl, const OptionalTensor& grad_entropy,
                       const Tensor& logits, const Tensor& ref_logits, const Tensor& token_ids,
                       const OptionalTensor& mask, const Tensor& policy_state,
                       const Tensor& ref_state, const Tensor& kl, const Tensor& entropy,
                       double temperature, double ref_temperature, std::optional<double> softcap,
                       std::optional<double> ref_softcap, bool part, const Tensor& grad_logits) {
  const Models models(logits, ref_logits, temperature, ref_temperature, softcap, ref_softcap);
  const Saved saved{{floats_of(grad_logprob, "grad_logprob", logits)},
                    {floats_of(grad_kl, "grad_kl", logits)},
                    {floats_of(grad_forward_kl, "grad_forward_kl", logits)},
                    {floats_of(grad_entropy, "grad_entropy", logits)},
                    {state_of(policy_state, "policy_state", logits)},
                    {state_of(ref_state, "ref_state", logits)},
                    {floats_of(kl, "kl", logits)},
                    {floats_of(entropy, "entropy", logits)}};
  backward_rows(models, token_ids, mask, saved, temperature, part, grad_logits);
}

void scale_gradient(const Tensor& gradient, const Tensor& factor) {
  const float by = *data_of<float>(factor, "factor", ScalarType::Float, 1, gradient);
  if (by == 1) return;
  const Logits rows(gradient, "gradient", 1, std::nullopt);
  for_each_row(rows.n_rows(), rows.vocab_size(),
               [&](int64_t row) { row_kernels().scale(rows.row(row), rows.vocab_size(), by); });
}

std::tuple<Tensor, Tensor> gae(const Tensor& rewards, const Tensor& values, const Tensor& mask,
                               double gamma, double lam, bool skip_masked,
                               const OptionalTensor& cu_seqlens) {
  const int64_t n_batch = rewards.size(0), n_tokens = rewards.size(1);
  const float* const reward_data = floats_of(rewards, "rewards", rewards);
  const float* const value_data = floats_of(values, "values", rewards);
  const bool* const mask_data = mask_of(mask, rewards);
  const int64_t* const bounds = cu_seqlens_of(cu_seqlens, rewards);
  const int64_t n_sequences = cu_seqlens ? cu_seqlens->numel() - 1 : n_batch;
  if (bounds != nullptr)
    check(bounds[0] == 0 && bounds[n_sequences] == n_tokens &&
              std::is_sorted(bounds, bounds + n_sequences + 1),
          "cu_seqlens must ascend from 0 to the number of tokens");
  Tensor advantages = new_rows(rewards), returns = new_rows(rewards);
  float *advantage_data = floats(advantages), *return_data = floats(returns);
  const int64_t work = n_batch * n_tokens / std::max<int64_t>(1, n_sequences);
  for_each_row(n_sequences, std::max<int64_t>(1, work), [&](int64_t s) {
    const int64_t at = bounds ? bounds[s] : s * n_tokens;
    const int64_t length = bounds ? bounds[s + 1] - at : n_tokens;
    gae_sequence(reward_data + at, value_data + at, mask_data + at, length, gamma, lam, skip_masked,
                 advantage_data + at, return_data + at);
  });
  return {advantages, returns};
}

}  // namespace
}  // namespace kl_kernels::bindings

KL_KERNELS_REGISTER(kl_kernels_cpu, CPU)
