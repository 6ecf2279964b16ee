// The CUDA kernels and the functions that launch them, for nvcc: the library of cuda_launches.py.
#include "../backends/host/entry_points.h"
