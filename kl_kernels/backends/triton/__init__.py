"""The Triton backend: the operators of `schemas.OPERATORS` for NVIDIA and AMD GPUs.

This is the only file that knows Triton may be missing: the kernels are imported when the first
operator is asked for. With TRITON_INTERPRET=1 set before that, they run on the CPU: slowly, but
enough for tests.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch

from kl_kernels.schemas import OPERATORS

ON_MIXTURES = ("token_jsd", "mixture_part", "token_jsd_backward")


def unavailable_reason() -> str | None:
    """Why this backend cannot run here, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "torch finds no GPU"
    return None


def __getattr__(name: str) -> Any:
    if name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kl_kernels.backends.triton import launch, launch_mixture

    return getattr(launch_mixture if name in ON_MIXTURES else launch, name)
