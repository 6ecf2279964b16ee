// Rows over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kl_kernels {

// Whether this process may use torch's threads. OpenMP's are not there after a fork, and a child of
// a process that had used them would wait for them for ever.
inline bool may_use_threads() {
#if defined(__unix__) || defined(__APPLE__)
  static std::atomic<pid_t> user{0};  // the process that was first to use them
  const pid_t process = getpid();
  pid_t first = 0;
  return user.compare_exchange_strong(first, process) || first == process;
#else
  return true;
#endif
}

// Calls `work(row)` for every row. Rows are handed out one after the other, because rows under a
// mask take no time; small rows in batches, so that the counter is not fought over. `work` must not
// throw: the text of an exception is lost on its way out of the threads.
template <class Work>
void for_each_row(int64_t n_rows, int64_t vocab_size, const Work& work) {
  constexpr int64_t kBatchElements = 1 << 14;
  const int64_t batch = std::max<int64_t>(1, kBatchElements / vocab_size);
  const int64_t n_batches = (n_rows + batch - 1) / batch;
  std::atomic<int64_t> next{0};
  const auto drain = [&](int64_t, int64_t) {
    for (int64_t i = next++; i < n_batches; i = next++) {
      const int64_t end = std::min(n_rows, (i + 1) * batch);
      for (int64_t row = i * batch; row < end; ++row) work(row);
    }
  };
  const int64_t n_workers = std::min<int64_t>(torch::stable::get_num_threads(), n_batches);
  if (n_workers <= 1 || !may_use_threads())
    drain(0, 1);
  else
    torch::stable::parallel_for(0, n_workers, 1, drain);
}

}  // namespace kl_kernels
