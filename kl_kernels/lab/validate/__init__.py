"""Every backend against float64, on inputs chosen to be hard: `python -m kl_kernels validate`."""
