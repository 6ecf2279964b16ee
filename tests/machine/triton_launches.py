"""Triton's launches, run as the PTX that they compile to, on CPU tensors.

Needs a process in which TRITON_INTERPRET is not set. Kernels are compiled as for a launch, but for
ptxas, which nobody needs here; they are kept apart from those of a GPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from torch import Tensor
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

from kl_kernels.backends import triton as triton_kernels
from kl_kernels.lab.codegen.compile import TARGETS, OfflineDriver

from .blocks import Kernel
from .launches import Launches
from .parse import parse

BUILD = Path(__file__).parents[2] / "build/machine"  # compiled kernels, kept between processes

# Triton's names of types, as struct's.
FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
    "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d",
}  # fmt: skip
SCRATCH = 2  # pointers that Triton adds to the parameters: global and profiling scratch memory


class Driver(OfflineDriver):
    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device


class TritonLaunches(Launches):
    """Inside the context, every launch of a Triton kernel runs on the machine.

    Args:
        arch: a key of `codegen.compile.TARGETS`, such as "sm_90".
        counting: whether to count accesses.
    """

    def __init__(self, arch: str, *, counting: bool = False) -> None:
        super().__init__(counting=counting)
        self.arch = arch

    def __enter__(self) -> TritonLaunches:
        super().__enter__()
        enter = self._patches.enter_context
        enter(triton.knobs.cache.scope())
        triton.knobs.cache.dir = str(BUILD / f"triton-{triton.__version__}")
        # Not set_active: on the way out, reset_active would look for a GPU's driver.
        enter(patch.object(triton.runtime.driver, "_active", Driver(TARGETS[self.arch])))
        enter(patch.object(CUDABackend, "make_cubin", lambda *_: b""))
        enter(patch.object(JITFunction, "run", self._run(JITFunction.run)))
        return self

    def kernels(self) -> Any:
        return triton_kernels

    def _run(self, compile_only: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            compiled = compile_only(function, *args, grid=grid, warmup=True, **options)
            if not warmup:
                names = function.signature.parameters
                given = {name: value for name, value in options.items() if name in names}
                bound = function.signature.bind(*args, **given)
                bound.apply_defaults()
                self._take(compiled, bound.arguments, grid)
            return compiled

        return run

    def _take(self, compiled: Any, arguments: Mapping[str, Any], grid: Any) -> None:
        kernel = self.kernel_of(compiled.asm["ptx"])
        threads = 32 * compiled.metadata.num_warps
        assert kernel.function.threads == threads
        passed = [(n, kind) for n, kind in compiled.src.signature.items() if kind != "constexpr"]
        self.launch(
            kernel,
            [arguments[n] for n, kind in passed if isinstance(arguments[n], Tensor)],
            grid=grid(dict(arguments)) if callable(grid) else grid,
            threads=threads,
            parameters=packed(kernel.function, [(kind, arguments[n]) for n, kind in passed]),
            shared_bytes=compiled.metadata.shared,
        )

    def kernel_of(self, ptx: str) -> Kernel:
        if ptx not in self.lowered:
            (function,) = parse(ptx).values()
            self.lower(ptx, function)
        return self.lowered[ptx]


def packed(function: Any, values: list[tuple[str, Any]]) -> bytes:
    """Values and their types in Triton's names, as a kernel's parameters."""
    places = list(function.params.values())
    assert len(places) == len(values) + SCRATCH, (len(places), len(values))
    parameters = bytearray(function.param_bytes)
    for (kind, value), (offset, size, _) in zip(values, places):
        if kind.startswith("*"):
            field = struct.pack("<Q", value.data_ptr())
        else:
            field = struct.pack("<" + FORMATS[kind], value)
        assert len(field) == size
        parameters[offset : offset + size] = field
    return bytes(parameters)
