"""Compile Triton kernels without a GPU, and disassemble them.

A driver that only names a target lets Triton's JIT compile offline, with the specialisation it
would choose at run time. Needs a process in which TRITON_INTERPRET is not set, and which launches
nothing itself.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from kl_kernels.backends.triton import launch
from kl_kernels.lab.codegen import sass
from kl_kernels.lab.codegen.sass import Kernel
from kl_kernels.lab.codegen.variants import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class OfflineDriver:
    """A driver with the functions that the JIT calls before a launch."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextmanager
def empty_cache() -> Iterator[None]:
    """Use a temporary cache: everything compiled inside is compiled anew."""
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope():
        triton.knobs.cache.dir = folder
        yield


def compile_kernel(arch: str, kernel: Any, arguments: Mapping[str, Any]) -> Any:
    """Compile a JIT function for one of TARGETS, with its arguments and options as for a launch.

    A dtype or a `MockTensor` stands for a pointer, to memory that is aligned. Gives what Triton
    compiles to: `.asm` by stage, and `.metadata`.
    """
    triton.runtime.driver.set_active(OfflineDriver(TARGETS[arch]))
    kernel.device_caches.clear()  # kept by device number, whatever its target
    wrapped = {name: MockTensor.wrap_dtype(a) for name, a in arguments.items()}
    return kernel.warmup(grid=(1,), **wrapped)


def compile_for(arch: str, variant: Variant) -> tuple[Kernel, dict[str, bytes]]:
    """Compile `variant` for one of TARGETS; files are by suffix. AMD's loops are not counted."""
    target = TARGETS[arch]
    # One lane per thread, whatever the size of a warp.
    lanes = variant.arguments.get("N", launch.CONFIG.lanes)
    options = {**launch.COMPILE, "num_warps": lanes // target.warp_size}
    compiled = compile_kernel(arch, variant.kernel, {**variant.arguments, **options})
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        files = {"amdgcn": text.encode(), "hsaco": compiled.asm["hsaco"]}
        (registers, stack), loops = _amd_usage(text), {}
    else:
        text = disassemble(compiled.asm["cubin"])
        files = {
            "ptx": compiled.asm["ptx"].encode(),
            "cubin": compiled.asm["cubin"],
            "sass": text.encode(),
        }
        (registers, stack), loops = sass.usage(text), _named_loops(variant, text)
    shared, num_warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Kernel(variant.name, registers, stack, shared, num_warps, loops), files


def _named_loops(variant: Variant, listing: str) -> dict[str, sass.Loop]:
    if not variant.loops:
        return {}
    loops = sass.loops(listing, variant.units)
    if len(loops) != len(variant.loops):
        raise RuntimeError(
            f"{variant.name} has {len(loops)} loops that read memory, not {len(variant.loops)}: "
            "the compiler has split or unrolled one"
        )
    return dict(zip(variant.loops, loops))


def _amd_usage(text: str) -> tuple[int, int]:
    """Vector registers of a thread, and bytes of its scratch memory."""
    fields = ("vgpr_count", "private_segment_fixed_size")
    registers, stack = (int(re.findall(rf"\.{field}: +(\d+)", text)[0]) for field in fields)
    return registers, stack


def disassemble(cubin: bytes) -> str:
    """Disassemble with the disassembler that comes with Triton."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cubin")
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
