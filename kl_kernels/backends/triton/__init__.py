"""The Triton backend: the operators of `schemas.OPERATORS` for NVIDIA and AMD GPUs.

This is the only file that knows Triton may be missing: the kernels are imported when the first
operator is asked for. With TRITON_INTERPRET=1 set before that, they run on the CPU: slowly, but
enough for tests.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch

from kl_kernels.schemas import OPERATORS

# Where an operator's launcher is, if not in `launch`.
ELSEWHERE = {
    **dict.fromkeys(("token_jsd", "mixture_part", "token_jsd_backward"), "launch_mixture"),
    **dict.fromkeys(("fold_part", "fold_tail", "finish_parts"), "launch_parts"),
}


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
    module = ELSEWHERE.get(name, "launch")
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)
