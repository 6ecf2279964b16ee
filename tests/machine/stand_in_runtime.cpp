// Stands in for the CUDA runtime that nvcc's host code calls: a launch goes to a function of
// whoever loads the library, which is told the kernel's name, sizes and parameters.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <map>
#include <string>

namespace {

// Returns 0 if the launch was made.
using Launcher = int (*)(const char* kernel, unsigned blocks, unsigned threads, size_t shared_bytes,
                         unsigned blocks_per_cluster, void** parameters);
Launcher launcher;

struct Kernel {
  std::string name;
  std::map<cudaFuncAttribute, int> allowed;  // limits set by cudaFuncSetAttribute
};
// By address of the host's function. A function's variable: kernels register before main.
std::map<const void*, Kernel>& kernels() {
  static std::map<const void*, Kernel> all;
  return all;
}

struct Gpu {
  int shared_per_block, shared_per_sm, sms_per_group;  // sms_per_group: 0 if it has no clusters
} gpu;
constexpr int kReservedPerBlock = 1024, kGroups = 8;
constexpr unsigned kPortableCluster = 8, kLargestCluster = 16;
unsigned blocks_of_last_cluster = 1;

unsigned blocks_per_cluster(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension)
      return config.attrs[i].val.clusterDim.x;
  return 1;
}

int clusters_per_group(int shared_bytes, unsigned n_blocks) {
  // GPUs without clusters run blocks alone.
  const int sms = gpu.sms_per_group > 0 ? gpu.sms_per_group : 16;
  return gpu.shared_per_sm / (shared_bytes + kReservedPerBlock) * sms / static_cast<int>(n_blocks);
}

}  // namespace

extern "C" {

void set_launcher(Launcher function) { launcher = function; }

void host_device(int shared_per_block, int shared_per_sm, int sms_per_group) {
  gpu = {shared_per_block, shared_per_sm, sms_per_group};
}

int host_blocks_of_last_cluster() { return static_cast<int>(blocks_of_last_cluster); }

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = gpu.shared_per_block;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = gpu.shared_per_sm;
      return cudaSuccess;
    case cudaDevAttrReservedSharedMemoryPerBlock:
      *value = kReservedPerBlock;
      return cudaSuccess;
    case cudaDevAttrClusterLaunch:
      *value = gpu.sms_per_group > 0;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value > gpu.shared_per_block)
    return cudaErrorInvalidValue;
  kernels().at(kernel).allowed[attribute] = value;
  return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveClusters(int* n, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  constexpr int kWithoutAsking = 48 << 10;
  auto& allowed = kernels().at(kernel).allowed;
  const int bytes = static_cast<int>(config->dynamicSmemBytes);
  const unsigned blocks = blocks_per_cluster(*config);
  if (bytes > std::max(kWithoutAsking, allowed[cudaFuncAttributeMaxDynamicSharedMemorySize]) ||
      blocks > kLargestCluster || (blocks > 1 && gpu.sms_per_group == 0) ||
      (blocks > kPortableCluster && !allowed[cudaFuncAttributeNonPortableClusterSizeAllowed]))
    return cudaErrorInvalidConfiguration;
  *n = kGroups * clusters_per_group(bytes, blocks);
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** parameters) {
  int at_once = 0;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(&at_once, kernel, config);
  if (error != cudaSuccess) return error;
  const unsigned blocks = blocks_per_cluster(*config);
  if (at_once == 0 || config->gridDim.x % blocks != 0) return cudaErrorInvalidConfiguration;
  blocks_of_last_cluster = blocks;
  return launcher(kernels().at(kernel).name.c_str(), config->gridDim.x, config->blockDim.x,
                  config->dynamicSmemBytes, blocks, parameters) == 0
             ? cudaSuccess
             : cudaErrorLaunchFailure;
}

// Called by code that nvcc generates: registration before main, and the host's side of a kernel,
// which is never called (kernels are launched by cudaLaunchKernelExC alone).

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 0; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  kernels()[host].name = device;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorUnknown; }
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorUnknown; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorUnknown;
}
}
