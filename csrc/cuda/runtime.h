// The CUDA runtime. tests/backends/host runs the kernels on host threads and provides the same
// names.
#pragma once

#if defined(KL_CUDA_ON_HOST)
#include "cuda_on_host.h"
#else
#include <cuda_runtime_api.h>
#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif
#endif
