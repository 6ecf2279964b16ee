"""What the Triton kernels compile to, counted in the machine code of the loops, without a GPU.

A driver that only names a target lets Triton's JIT compile offline, with the specialisation it
would choose at run time. Needs a process in which TRITON_INTERPRET is not set, and the disassembler
that comes with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import MockTensor

from kl_kernels.triton_kernels import launch
from kl_kernels.triton_kernels.backward import backward_kernel
from kl_kernels.triton_kernels.fold import fold_kernel

NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;")
BACKWARD_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


@dataclass(frozen=True)
class Loop:
    """An innermost loop that reads logits; counts are of one iteration of one thread."""

    opcodes: Counter[str]
    logits: int  # logits, or pairs of a policy's and a reference's logit, per iteration

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    @property
    def instructions_per_logit(self) -> float:
        return self.count("") / self.logits

    @property
    def mufu_per_logit(self) -> float:
        """Special functions: exponentials run at an eighth of the rate of the rest."""
        return self.count("MUFU") / self.logits


@dataclass(frozen=True)
class Kernel:
    registers: int
    stack_bytes: int  # more than 0: spilled
    loops: tuple[Loop, ...]  # in program order


class _OfflineDriver:
    """What the JIT asks of a driver before it has anything to launch."""

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


def compile_for(capability: int) -> None:
    """Compile from here on for an NVIDIA GPU of this compute capability (90: an H100 or H200)."""
    triton.runtime.driver.set_active(_OfflineDriver(GPUTarget("cuda", capability, 32)))
    for kernel in (fold_kernel, backward_kernel):
        kernel.device_caches.clear()  # they are kept by device number, whatever its target


# Sizes of a call: none of them is compiled in, but for vocab_size being a multiple of 16.
SIZES = {
    "n_rows": 64, "n_tokens": 8, "vocab_size": 128256, "n_splits": 4,
    "batch_stride": 1, "token_stride": 1, "ref_batch_stride": 1, "ref_token_stride": 1,
}  # fmt: skip
PER_TOKEN = torch.float32


def count_fold(logits: torch.dtype, ref: torch.dtype | None, *, aligned: bool = True) -> Kernel:
    """The forward kernel for these dtypes; ref None: of the policy alone."""
    tile = _tile(logits, ref, aligned=aligned)
    compiled = _compile(
        fold_kernel, **tile, SPLIT=launch.CONFIG.fold_split,
        logits_ptr=logits, ref_ptr=ref, token_ids_ptr=torch.int64, mask_ptr=torch.bool,
        states_ptr=PER_TOKEN, k=1.0, ref_k=1.0, softcap=None, ref_softcap=None,
    )  # fmt: skip
    return _count(compiled, tile["STEPS"] * tile["LANE"])


def count_backward(
    logits: torch.dtype, ref: torch.dtype | None, *, forward_kl: bool, aligned: bool = True
) -> Kernel:
    """The backward kernel for log-probability, entropy and, with a ref, KL gradients."""
    tile = _tile(logits, ref, aligned=aligned)
    of_ref = PER_TOKEN if ref else None
    compiled = _compile(
        backward_kernel, **tile, SPLIT=launch.CONFIG.backward_split,
        grad_logprob_ptr=PER_TOKEN, grad_kl_ptr=of_ref, grad_entropy_ptr=PER_TOKEN,
        grad_forward_kl_ptr=PER_TOKEN if forward_kl else None,
        logits_ptr=logits, ref_ptr=ref, token_ids_ptr=torch.int64, mask_ptr=torch.bool,
        policy_state_ptr=PER_TOKEN, ref_state_ptr=of_ref, kl_ptr=of_ref, entropy_ptr=PER_TOKEN,
        grad_logits_ptr=logits, temperature=1.0, k=1.0, ref_k=1.0, softcap=None, ref_softcap=None,
    )  # fmt: skip
    return _count(compiled, tile["STEPS"] * tile["LANE"])


def _compile(kernel: Any, **arguments: Any) -> Any:
    """A dtype stands for a pointer to it."""
    mocked = {name: MockTensor.wrap_dtype(argument) for name, argument in arguments.items()}
    return kernel.warmup(**mocked, **SIZES, **launch.COMPILE, grid=(1,))


def _tile(logits: torch.dtype, ref: torch.dtype | None, *, aligned: bool) -> dict[str, int]:
    shape = (1, 1, 16 if aligned else 17)
    return launch._tile(*(torch.empty(shape, dtype=d) for d in (logits, ref) if d))


def _count(compiled: Any, logits: int) -> Kernel:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("-res-usage", cubin.name)
        code = INSTRUCTION.findall(_cuobjdump("-sass", cubin.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {usage!r}")
    loops = tuple(loop for loop in _loops(code, logits) if loop.count("LDG"))
    return Kernel(int(found[1]), int(found[2]), loops)


def _cuobjdump(option: str, path: str) -> str:
    command = [str(NVIDIA_TOOLS / "cuobjdump"), option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _loops(code: list[tuple[str, str]], logits: int) -> list[Loop]:
    """Every span from the target of a backward branch to the branch."""
    index = {int(address, 16): i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (_, text) in enumerate(code):
        branch = BACKWARD_BRANCH.search(text)
        start = index.get(int(branch[1], 16), i) if branch else i
        if start < i:
            body = [re.sub(r"^@!?U?P\w+\s+", "", t).split()[0] for _, t in code[start : i + 1]]
            loops.append(Loop(Counter(body), logits))
    return loops
