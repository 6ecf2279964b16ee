"""RLHF arithmetic on per-token tensors: plain torch, no kernels, usable in any trainer."""
