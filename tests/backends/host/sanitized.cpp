// Every kernel once, for AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: on
// arrays of exactly the right size, aligned and not, with rows that take both loops, masked rows
// and token ids outside the vocabulary. Whether the numbers are right is
// tests/backends/test_cuda_on_host.py's job.
#include "kernels.cpp"

#include <stdio.h>
#include <stdlib.h>

#include <algorithm>

namespace {

constexpr int64_t kBatch = 2, kTokens = 2, kRows = kBatch * kTokens;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "a launch failed\n");
  exit(1);
}

template <class T>
struct Array {  // on the heap, where the sanitizers see its ends
  explicit Array(int64_t n, T value = {}) : values(static_cast<T*>(malloc(n * sizeof(T) + !n))) {
    for (int64_t i = 0; i < n; ++i) values[i] = value;
  }
  ~Array() { free(values); }
  T* values;
};

uint32_t random_bits() {
  static uint32_t state = 1;
  return state = state * 1664525u + 1013904223u;
}

// Logits that begin `shift` elements after an aligned address; row 1 holds -inf, row 2 a NaN.
template <class T>
struct RandomLogits : Array<T> {
  RandomLogits(int64_t vocab_size, int64_t shift)
      : Array<T>(shift + kRows * vocab_size), at(this->values + shift) {
    for (int64_t i = 0; i < kRows * vocab_size; ++i)
      from_float(8.0f * static_cast<float>(random_bits() >> 8) / (1 << 24), at[i]);
    from_float(-INFINITY, at[vocab_size + vocab_size / 2]);
    from_float(NAN, at[2 * vocab_size + vocab_size / 3]);
  }
  T* at;
};

template <class T>
Logits view(const RandomLogits<T>& logits, Dtype dtype, int64_t vocab_size, float softcap) {
  return {logits.at, dtype, kTokens * vocab_size, vocab_size, 1.3f, softcap};
}

// The shared memory of the device, and the SMs of a group; 0: no clusters.
struct Device {
  int64_t bytes;
  int sms_per_group;
};

// The policy loss on devices that keep the row in one block or in two, or have it read again.
template <class Run>
void on_devices(int64_t row_bytes, const Run& run) {
  constexpr int64_t kBesides = 600;
  for (const Device device :
       {Device{row_bytes + kBesides, 0}, {row_bytes / 2 + kBesides, 16}, {0, 0}}) {
    host_device(static_cast<int>(device.bytes), 1 << 20, device.sms_per_group);
    run();
  }
}

template <class T, class R>
void run(Dtype dtype, Dtype ref_dtype, int64_t vocab_size, int64_t shift, float softcap) {
  const RandomLogits<T> logits(vocab_size, shift);
  const RandomLogits<R> ref_logits(vocab_size, shift);
  const Logits policy = view(logits, dtype, vocab_size, softcap);
  const Logits reference = view(ref_logits, ref_dtype, vocab_size, 0);
  Array<int64_t> token_ids(kRows);
  token_ids.values[0] = vocab_size - 1;
  token_ids.values[1] = vocab_size;  // outside
  token_ids.values[2] = -1;          // outside
  Array<bool> mask(kRows, true);
  mask.values[3] = false;
  const Rows rows{kRows, kTokens, vocab_size, token_ids.values, mask.values};

  Array<float> values(7 * kRows), states(4 * kRows), part_states(kStateFields * kRows),
      scores(kBatch, 1.0f), ones(kRows, 1.0f);
  Array<int64_t> score_index(kBatch, 1);
  const auto value = [&](int i) { return values.values + i * kRows; };
  float *policy_state = states.values, *ref_state = states.values + 2 * kRows;
  const Outputs outputs{value(0),     value(1),  value(2), value(3), value(4),
                        policy_state, ref_state, value(5), value(6), part_states.values};
  const RewardParams params{scores.values, score_index.values, 0.1f, Estimator::exact, INFINITY};
  Array<char> scratch(host_scratch_bytes(&rows));
  check(launch_forward<Launch>(rows, policy, reference, outputs, params, scratch.values, nullptr));

  Array<T> grad(kRows * vocab_size);
  Saved saved{ones.values, nullptr,  nullptr,  ones.values, policy_state,
              ref_state,   value(2), value(4), 1.1,         false};
  const GradLogits separate{grad.values, kTokens * vocab_size, vocab_size};
  check(launch_backward<Launch>(rows, policy, reference, saved, separate, nullptr));
  saved.grad_kl = ones.values;
  check(launch_backward<Launch>(rows, policy, reference, saved, separate, nullptr));
  saved.grad_forward_kl = ones.values;
  check(launch_backward<Launch>(rows, policy, reference, saved, separate, nullptr));

  Rows no_token = rows;
  no_token.token_ids = nullptr;
  Outputs states_only{};
  states_only.policy_state = policy_state;
  states_only.ref_state = ref_state;
  check(launch_forward<Launch>(no_token, policy, reference, states_only, params, scratch.values,
                               nullptr));
  const FinishedRows finished{policy_state, ref_state, 0.3};
  const MixtureOutputs mixture{value(0), value(1), false};
  Array<char> mix_scratch(host_mix_scratch_bytes(&rows));
  check(launch_mix<Launch>(no_token, policy, reference, finished, mixture, mix_scratch.values,
                           nullptr));
  const SavedMixture saved_mixture{ones.values, value(1), 1.1};
  check(launch_mix_backward<Launch>(no_token, policy, reference, finished, saved_mixture, separate,
                                    nullptr));

  Outputs alone{};
  alone.logprob = value(0);
  alone.policy_state = policy_state;
  check(launch_forward<Launch>(rows, policy, Logits{}, alone, params, scratch.values, nullptr));

  Outputs tail{};
  tail.part_state = part_states.values;
  Array<int64_t> ids(2 * kRows);
  for (int64_t i = 0; i < 2 * kRows; ++i) ids.values[i] = i % 2 == 0 ? vocab_size / 2 : vocab_size;
  check(launch_tail<Launch>(rows, policy, {ids.values, 2}, tail, scratch.values, nullptr));

  const float range[] = {0, static_cast<float>(vocab_size)};
  check(launch_finish_parts({part_states.values, range, 1, kRows, true}, mask.values, outputs,
                            nullptr));

  const PolicyLossTokens tokens{value(0), ones.values, ones.values, nullptr, nullptr};
  const PolicyLossParams loss{0.2f, 0.2f, INFINITY, 20, 0.1f, 0.1f, Estimator::exact};
  Array<float> terms(kPolicyLossTerms * kRows);
  const auto policy_loss = [&](const Logits& against, const GradLogits& to) {
    check(launch_policy_loss<PolicyLossLaunches>(rows, policy, against, tokens, loss, 1.1, to,
                                                 terms.values, nullptr));
  };
  on_devices(2 * sizeof(T) * vocab_size, [&] { policy_loss(reference, separate); });
  policy_loss(Logits{}, separate);
  policy_loss(reference, GradLogits{});

  // Over the logits; then the one, and then the other, are gone.
  const GradLogits in_place{logits.at, kTokens * vocab_size, vocab_size};
  check(launch_backward<Launch>(rows, policy, reference, saved, in_place, nullptr));
  policy_loss(reference, in_place);
  check(launch_mix_backward<Launch>(no_token, policy, reference, finished, saved_mixture, in_place,
                                    nullptr));
  float factor = 1;
  check(launch_scale<Launch>(rows, in_place, dtype, &factor, nullptr));
  factor = 0.5f;
  check(launch_scale<Launch>(rows, in_place, dtype, &factor, nullptr));
}

void run_gae(int64_t n_tokens) {
  const int64_t n = 3 * n_tokens;
  Array<float> rewards(n, 1.0f), values(n, 0.5f), advantages(n), returns(n);
  Array<bool> mask(n, true);
  for (int64_t i = 0; i < n; i += 3) mask.values[i] = false;
  check(launch_gae(rewards.values, values.values, mask.values, 3, n_tokens, 0.99, 0.95, true,
                   nullptr, advantages.values, returns.values, nullptr));
  Array<int64_t> bounds(5);
  const int64_t wrong[] = {7, -2, 1, 3 * n, -2};
  std::copy(wrong, wrong + 5, bounds.values);
  check(launch_gae(rewards.values, values.values, mask.values, 4, n, 0.99, 0.95, true,
                   bounds.values, advantages.values, returns.values, nullptr));
}

}  // namespace

int main() {
  const Dtype f32 = Dtype::float32, bf16 = Dtype::bfloat16, f16 = Dtype::float16;
  for (const int64_t vocab_size : {1, 13, 2600}) {  // a tail alone; groups and a tail; two parts
    run<__nv_bfloat16, __nv_bfloat16>(bf16, bf16, vocab_size, 1, 0);
    run<__nv_bfloat16, float>(bf16, f32, vocab_size, 0, 5);
#if !defined(__SANITIZE_THREAD__)  // which is slow, and no thread waits by the dtype
    run<float, float>(f32, f32, vocab_size, vocab_size % 2, 0);
    run<__nv_bfloat16, __nv_bfloat16>(bf16, bf16, vocab_size, 0, 0);
    run<__half, __half>(f16, f16, vocab_size, 2, 0);
#endif
  }
  run_gae(1);
  run_gae(70);
  printf("all kernels ran\n");
}
