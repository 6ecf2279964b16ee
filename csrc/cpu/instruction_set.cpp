// Chooses among the object files of row.cpp what the machine can run.
#include <string.h>

#include "row.h"

namespace kl_kernels {
namespace {

struct InstructionSet {
  const char* name;
  const RowKernels* kernels;
  bool supported;
};

// Best first. The levels are spelled out because not every compiler knows them by name here.
const InstructionSet* instruction_sets() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"x86-64-v4", &row_kernels_v4,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"x86-64-v3", &row_kernels_v3,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {"base", &row_kernels_base, true},
  };
  return sets;
}

const InstructionSet* find(const char* name) {
  const InstructionSet* set = instruction_sets();
  for (;; ++set) {
    const bool last = set->kernels == &row_kernels_base;
    if (set->supported && (strcmp(name, "best") == 0 || strcmp(name, set->name) == 0)) return set;
    if (last) return nullptr;
  }
}

const InstructionSet*& in_use() {
  static const InstructionSet* set = find("best");
  return set;
}

}  // namespace

const RowKernels& row_kernels() { return *in_use()->kernels; }

}  // namespace kl_kernels

const char* kl_kernels_instruction_set(const char* select) {
  using namespace kl_kernels;
  if (select != nullptr) {
    const InstructionSet* set = find(select);
    if (set == nullptr) return nullptr;
    in_use() = set;
  }
  return in_use()->name;
}
