"""Loads the compiled backends, each from a library of its own, so that one cannot cost the other.

A compiled backend is the namespace `torch.ops.kl_kernels_<name>`: the schemas are ours
(`schemas.OPERATORS`), the library only implements them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from kl_kernels.forks import held_across_forks
from kl_kernels.schemas import OPERATORS, schema

DIRECTORY = Path(__file__).parents[1]
REMEDY = "in a checkout: pip install --no-build-isolation -e ."


def namespace(name: str) -> Any:
    """The operators of the compiled backend `name`; RuntimeError if it is unavailable."""
    reason = unavailable_reason(name)
    if reason is not None:
        raise RuntimeError(f"the {name} backend {reason}")
    return _load(name)


def unavailable_reason(name: str) -> str | None:
    """Reason why the compiled backend `name` cannot be used ("is not built ..."), or None."""
    loaded = _load(name)
    if isinstance(loaded, str):
        return loaded
    if name == "cuda" and not torch.cuda.is_available():
        return "torch finds no GPU"
    return None


_lock = held_across_forks()  # torch takes a namespace once, from whichever thread


def _load(name: str) -> SimpleNamespace | str:
    """The operators, or the reason why there are none."""
    with _lock:
        return _loaded(name)


@functools.cache
def _loaded(name: str) -> SimpleNamespace | str:
    path = library_path(name)
    if not path.exists():
        reason = path.with_name(f"_C_{name}.unavailable")  # written by setup.py
        told = reason.read_text().strip() if reason.exists() else "is not built"
        return f"{told} ({REMEDY})"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"does not load: {error} (to build it again, {REMEDY})"
    library = torch.library.Library(f"kl_kernels_{name}", "DEF")
    for operator in OPERATORS:
        library.define(operator + schema(operator))
    loaded = getattr(torch.ops, f"kl_kernels_{name}")
    operators = {operator: _of_one_argument(getattr(loaded, operator)) for operator in OPERATORS}
    return SimpleNamespace(library=library, **operators)  # they live as long as the library does


def _of_one_argument(operator: Any) -> Callable[[tuple[Any, ...]], Any]:
    overload = operator.default
    return lambda args: overload(*args)


def library_path(name: str) -> Path:
    return DIRECTORY / f"_C_{name}.abi3.so"


if hasattr(os, "register_at_fork"):
    # A child knows by its parent's library that torch's threads are gone (csrc/cpu/parallel.h).
    os.register_at_fork(before=lambda: _load("cpu"))
