"""What the Triton kernels compile to, counted in machine code without a GPU."""
