"""The machine code of the Triton kernels, compiled and counted without a GPU."""
