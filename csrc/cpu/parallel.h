// Rows over torch's own threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace kl_kernels {

// Whether this process was forked from one that had this library. OpenMP's threads are not there
// after a fork, and a child of a process that had used them, be it for torch itself, would wait for
// them for ever. (native.py loads this library before a fork, if nothing has loaded it yet.)
inline std::atomic<bool> is_forked{false};
#if defined(__unix__) || defined(__APPLE__)
inline const int kForkHandler = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
#endif

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
  if (n_workers <= 1 || is_forked)
    drain(0, 1);
  else
    torch::stable::parallel_for(0, n_workers, 1, drain);
}

}  // namespace kl_kernels
