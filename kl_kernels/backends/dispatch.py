"""Choice of the backend that runs an operator, and the reasons against the others.

A backend is any namespace that has the functions of `schemas.OPERATORS`: the module `reference`,
the package `triton_kernels`, or the operators of a compiled library.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.backends import compiled as native
from kl_kernels.backends import reference
from kl_kernels.backends import triton as triton_kernels
from kl_kernels.checks import callers_level, check_choice


@dataclass(frozen=True)
class Backend:
    kernels: Callable[[], Any]  # the namespace with the operators
    unavailable_reason: Callable[[], str | None]  # why this machine lacks it, or None
    device_types: tuple[str, ...] = ()  # devices of the tensors it takes; empty: any
    takes_float64: bool = False
    casts_gradients: bool = False  # into a buffer that has another dtype than the logits


def _compiled(name: str) -> Backend:
    reason = cache(partial(native.unavailable_reason, name))
    return Backend(partial(native.namespace, name), reason, device_types=(name,))


# Best first: without a request, the first that can take the tensors runs. "cuda" comes after
# "triton" until it has been measured beside it.
BACKENDS = {
    "triton": Backend(
        kernels=lambda: triton_kernels,
        unavailable_reason=cache(triton_kernels.unavailable_reason),
        # Triton's interpreter runs kernels on the host; compiled, they run on a GPU.
        device_types=("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",),
        casts_gradients=True,
    ),
    "cuda": _compiled("cuda"),
    "cpu": _compiled("cpu"),
    "reference": Backend(lambda: reference, lambda: None, takes_float64=True, casts_gradients=True),
}
# The interpreter is for checking kernels, a thousand times slower than anything else.
ONLY_ON_REQUEST = {("triton", "cpu")}


def refusal(name: str, device_type: str, *, float64: bool) -> str | None:
    """Why backend `name` cannot run on such tensors, or None."""
    backend = BACKENDS[name]
    if reason := backend.unavailable_reason():
        return reason
    if backend.device_types and device_type not in backend.device_types:
        return f"runs on {' and '.join(backend.device_types)} tensors, these are on {device_type}"
    if float64 and not backend.takes_float64:
        return "takes float32, bfloat16 and float16, one of these is float64"
    return None


class Choice(NamedTuple):
    """A backend whose operators are loaded."""

    kernels: Any
    casts_gradients: bool


@cache
def _choose(requested: str | None, device_type: str, float64: bool) -> Choice:
    if requested is None:
        candidates = [n for n in BACKENDS if (n, device_type) not in ONLY_ON_REQUEST]
        usable = (n for n in candidates if refusal(n, device_type, float64=float64) is None)
        name = next(usable)
        if name == "reference":
            _warn_of_reference(device_type, float64)
        return _loaded(BACKENDS[name])
    check_choice("backend", requested, tuple(BACKENDS))
    refusals = {n: refusal(n, device_type, float64=float64) for n in BACKENDS}
    if refusals[requested] is not None:
        possible = ", ".join(repr(n) for n, reason in refusals.items() if reason is None)
        others = "; ".join(f"{n!r} {reason}" for n, reason in refusals.items() if reason)
        raise ValueError(f"backend {requested!r} cannot run here; possible: {possible}; {others}")
    return _loaded(BACKENDS[requested])


def _loaded(backend: Backend) -> Choice:
    return Choice(backend.kernels(), backend.casts_gradients)


def _warn_of_reference(device_type: str, float64: bool) -> None:
    if float64:
        _warn(
            "float64 tensors run in plain PyTorch, 14 times slower or more: the compiled backends "
            "take float32, bfloat16 and float16"
        )
        return
    reasons = {
        name: refusal(name, device_type, float64=False)
        for name, backend in BACKENDS.items()
        if device_type in backend.device_types and (name, device_type) not in ONLY_ON_REQUEST
    }
    why = "; ".join(f"backend {name!r} {reason}" for name, reason in reasons.items())
    _warn(
        f"{device_type} tensors run in plain PyTorch in float64, 14 times slower or more: "
        f"{why or 'no other backend takes them'}; imported from {native.DIRECTORY}"
    )


@cache
def _warn(reason: str) -> None:
    """Say once per process what is slow, at the line that called this package."""
    silence = 'backend="reference" asks for this, without a warning'
    warnings.warn(f"kl_kernels: {reason}; {silence}", stacklevel=callers_level())


def choose(requested: str | None, tensors: Sequence[Tensor]) -> Any:
    """The operators of the requested backend, or of the best that can take these tensors.

    Raises:
        ValueError: the request is unknown or impossible; the message lists what is possible, and
            why the rest is not.
    """
    float64 = False
    for tensor in tensors:  # not any(): a generator costs a microsecond
        float64 = float64 or tensor.dtype is torch.float64
    return _choose(requested, tensors[0].device.type, float64).kernels


def casts_gradients(requested: str | None, logits: Tensor) -> bool:
    """Whether the backend of these logits rounds a gradient into a buffer of another dtype."""
    if logits.is_meta:  # stands for a GPU
        return BACKENDS[requested or "triton"].casts_gradients
    return _choose(requested, logits.device.type, logits.dtype is torch.float64).casts_gradients
