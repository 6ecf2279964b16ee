"""Which backend runs an operator, and why not the others.

A backend is any namespace that has the functions of `ops.KERNELS`: the module `reference`, the
package `triton_kernels`, or the operators of a compiled library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def choose(requested: str | None, tensors: Sequence[Tensor]) -> Any:
    """The backend for these tensors: the requested one, or the best that can take them."""
    from kl_kernels import native, reference

    if requested == "cpu":
        return native.namespace("cpu")
    return reference
