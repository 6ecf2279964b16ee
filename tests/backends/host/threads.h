// The threads of a launch: real ones, or fibers that take turns on one.
//
// ThreadSanitizer needs real threads. But they meet at barriers more often than they add numbers,
// and a barrier of threads that outnumber the cores costs microseconds for each of them, one of
// fibers (CUDA_ON_HOST_FIBERS) a jump.
#pragma once

#ifdef CUDA_ON_HOST_FIBERS
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#else
#include <barrier>
#include <thread>
#endif

#include <functional>
#include <vector>

namespace cuda_on_host {

struct Thread;
inline thread_local Thread* self;  // what the running thread knows of itself

#ifdef CUDA_ON_HOST_FIBERS

struct Fiber {
  static constexpr size_t kStack = 256 << 10;

  jmp_buf at;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[kStack]};  // touched as far as it is used
  bool has_started;
  Fiber *next, *previous;  // of those that are not done, in a circle
};

inline std::vector<std::unique_ptr<Fiber>> fibers;  // kept from launch to launch
inline Fiber* running;
inline const std::function<void(int)>* work;
inline jmp_buf all_done;

[[noreturn]] inline void jump_to(Fiber* fiber) {
  running = fiber;
  if (fiber->has_started) _longjmp(fiber->at, 1);
  fiber->has_started = true;
  setcontext(&fiber->start);
  __builtin_trap();
}

inline void let_others_run() {
  Thread* const me = self;
  if (_setjmp(running->at) == 0) jump_to(running->next);
  self = me;
}

inline void run_fiber(int index) {
  (*work)(index);
  Fiber* const done = running;
  if (done->next == done) _longjmp(all_done, 1);
  done->previous->next = done->next;
  done->next->previous = done->previous;
  jump_to(done->next);
}

inline void run_together(int n, const std::function<void(int)>& run) {
  while (static_cast<int>(fibers.size()) < n) fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < n; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.has_started = false;
    fiber.next = fibers[(i + 1) % n].get();
    fiber.previous = fibers[(i + n - 1) % n].get();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = Fiber::kStack;
    fiber.start.uc_link = nullptr;
    makecontext(&fiber.start, reinterpret_cast<void (*)()>(run_fiber), 1, i);
  }
  work = &run;
  if (_setjmp(all_done) == 0) jump_to(fibers[0].get());
}

class Barrier {
 public:
  using arrival_token = long;

  explicit Barrier(int n) : expected_(n) {}

  arrival_token arrive() {
    const arrival_token phase = phase_;
    if (++arrived_ == expected_) {
      arrived_ = 0;
      ++phase_;
    }
    return phase;
  }
  void wait(arrival_token phase) const {
    while (phase_ == phase) let_others_run();
  }
  void arrive_and_wait() { wait(arrive()); }

 private:
  const int expected_;
  int arrived_ = 0;
  arrival_token phase_ = 0;
};

#else

inline void run_together(int n, const std::function<void(int)>& run) {
  std::vector<std::thread> threads;
  for (int i = 0; i < n; ++i) threads.emplace_back(run, i);
  for (std::thread& thread : threads) thread.join();
}

using Barrier = std::barrier<>;

#endif

}  // namespace cuda_on_host
