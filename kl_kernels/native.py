"""Loads the compiled backends, each from a library of its own, so that one cannot cost the other.

A compiled backend is the namespace `torch.ops.kl_kernels_<name>`: the schemas are ours
(`ops.KERNELS`), the library only implements them.
"""

from __future__ import annotations

from typing import Any


def namespace(name: str) -> Any:
    raise RuntimeError(f"the {name} library is not built")


def unavailable_reason(name: str) -> str | None:
    return "is not built"
