// The CUDA kernels as a host library for tests/backends/test_cuda_on_host.py.
#define KL_CUDA_ON_HOST
#include "entry_points.h"

extern "C" {

// The GPU that the kernels believe to run on: the shared memory of a block and of an SM, in bytes,
// and the SMs of a group (GPC); 0: no clusters.
void host_device(int shared_per_block, int shared_per_sm, int sms_per_group) {
  int* const attributes = cuda_on_host::device_attributes;
  attributes[cudaDevAttrMaxSharedMemoryPerBlockOptin] = shared_per_block;
  attributes[cudaDevAttrMaxSharedMemoryPerMultiprocessor] = shared_per_sm;
  attributes[cudaDevAttrReservedSharedMemoryPerBlock] = 1024;
  attributes[cudaDevAttrClusterLaunch] = sms_per_group > 0;
  cuda_on_host::sms_per_group = sms_per_group > 0 ? sms_per_group : 16;
}

// Over how many blocks the kernels for a GPU keep a bfloat16 or a float32 row; 0: nowhere.
int host_blocks_per_row(int64_t vocab_size, bool float32, bool with_reference) {
  using Policy = PolicyLossLaunch::Resident;
  SharedMemory memory;
  shared_memory(memory);
  const auto n_parts = [&](auto element) {
    using T = decltype(element);
    const auto split = [&](auto reference) {
      constexpr bool kHasRef = decltype(reference)::value;
      return resident_split<Policy, T, kHasRef>(vocab_size, memory, [](const Split& split) {
        const auto bytes = static_cast<int>(resident_bytes<Policy, T, kHasRef>(split));
        return cuda_on_host::clusters_per_group(bytes, split.n_parts);
      });
    };
    return with_reference ? split(std::true_type{}).n_parts : split(std::false_type{}).n_parts;
  };
  return static_cast<int>(float32 ? n_parts(float{}) : n_parts(__nv_bfloat16{}));
}

int host_blocks_of_last_cluster() { return cuda_on_host::blocks_of_last_cluster; }
}
