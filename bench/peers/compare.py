"""The cases that are compared, the check of each contender, and the memory of its calls.

python -m bench.peers.compare FAMILY CASE...  # as JSON, the memory of a family's calls
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench.common.machine import PeakMemory
from bench.common.timing import peak_bytes
from bench.peers.contenders import Call, Contender, contenders
from bench.peers.definitions import Results, Size
from bench.peers.operations import OPERATIONS, Operation

GRADIENTS = ("gradient", "weight_gradient")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One size in bfloat16 for all, which takes minutes; the exact KL also in float32, and from one
# token to a batch, up to Gemma's vocabulary. A GPU gets a batch of Llama 3's.
MAIN, MORE, HEADS = {
    "cpu": (
        Size(64, 131072),
        (Size(1, 131072), Size(512, 32768), Size(16, 262144)),
        (Size(256, 32768, 256),),
    ),
    "cuda": (
        Size(8192, 128256),
        (Size(1, 128256), Size(64, 128256), Size(8192, 32000), Size(4096, 262144)),
        (Size(4096, 128256, 4096),),
    ),
}[DEVICE]
GAE = (Size(65536),)
FULL = tuple(Size(rows, v) for v in (32768, 131072, 262144) for rows in (1, 16, 64, 512, 8192))
FULL_HEADS = tuple(Size(rows, v, 1024) for v in (32768, 131072) for rows in (64, 1024, 8192))
FULL_GAE = (Size(1024), Size(65536), Size(1048576))
COPIES = 8  # float32 tensors of [rows, V] that the neediest contender may hold


class Wrong(RuntimeError):
    """A contender that must not be timed."""


@dataclass
class Case:
    operation: Operation
    size: Size
    dtype: torch.dtype
    truths: dict[frozenset[str], Results] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operation.name}, {self.size}, {str(self.dtype).removeprefix('torch.')}"

    @cached_property
    def inputs(self) -> object:
        return self.operation.make(self.size, self.dtype, DEVICE)

    @property
    def n_bytes(self) -> int:
        """Bytes that must pass through memory; 0 where products or loops are the work."""
        return self.operation.passes * self.size.rows * self.size.vocab_size * self.dtype.itemsize

    def forget(self) -> None:
        self.truths.clear()
        self.__dict__.pop("inputs", None)


def cases(full: bool) -> Iterator[Case]:
    half, single = torch.bfloat16, torch.float32
    for operation in OPERATIONS.values():
        dtypes = (half, single) if full else (half,)
        if operation.name == "GAE":
            sizes, dtypes = (FULL_GAE if full else GAE), (single,)
        elif operation.sources == ("hidden", "weight"):
            sizes = FULL_HEADS if full else HEADS
        else:
            sizes = FULL if full else (MAIN,)
        for dtype in dtypes:
            yield from (Case(operation, size, dtype) for size in sizes)
        if not full and operation.name.startswith("exact KL"):
            yield Case(operation, MAIN, single)
            yield from (Case(operation, size, half) for size in MORE)


def benchmarks(full: bool, only: str = "") -> list[tuple[Case, Contender]]:
    """Every case with every contender, those whose name contains `only`."""
    pairs = [(case, c) for case in cases(full) for c in contenders(case.operation.name)]
    return [(case, c) for case, c in pairs if only in name_of(str(case), c.name)]


def name_of(case: str, contender: str) -> str:
    """Name under which a benchmark is listed, chosen and reported."""
    return f"{case}, {contender}"


def too_large(size: Size, free: int) -> str:
    """Why a case is left out; "" if it fits."""
    needed = COPIES * 4 * size.rows * size.vocab_size
    if needed <= free:
        return ""
    return f"{size} may need {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


def free_memory() -> int:
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def check(case: Case, contender: Contender, call: Call) -> dict[str, float]:
    """Return the results' errors against float64; raise `Wrong` if one is beyond its tolerance."""
    x = case.inputs.head()
    got = call(x)
    names = frozenset(got) - frozenset(GRADIENTS) - frozenset(contender.constant)
    if names not in case.truths:
        case.truths[names] = case.operation.truth(x, names)
    errors = {"value_error": 0.0}
    for name, result in got.items():
        true = case.truths[names][name]
        result = result[tuple(map(slice, true.shape))]  # without an additional position
        kind = "gradient_error" if name in GRADIENTS else "value_error"
        error, allowed = (_gradient_error if name in GRADIENTS else _value_error)(
            result.detach(), true.detach(), contender, case.dtype
        )
        if not error <= allowed:  # also refuses NaN
            raise Wrong(
                f"{contender.name} is not timed: {name} of {case} is off by {error:.1e}, "
                f"{allowed:.1e} is allowed"
            )
        errors[kind] = max(errors.get(kind, 0.0), error)
    return errors


def _value_error(
    got: Tensor, true: Tensor, contender: Contender, dtype: torch.dtype
) -> tuple[float, float]:
    """Error relative to 1 + the true value."""
    if got.shape != true.shape:
        return float("nan"), 0.0
    error = ((got.double() - true).abs() / (1 + true.abs())).max()
    rounding = torch.finfo(got.dtype).eps + (3 * torch.finfo(dtype).eps if contender.rounds else 0)
    return float(error), contender.tolerance.value + rounding


def _gradient_error(
    got: Tensor, true: Tensor, contender: Contender, dtype: torch.dtype
) -> tuple[float, float]:
    """Error relative to the norm; a sum of products of rounded factors is rounded when stored."""
    if got.shape != true.shape:
        return float("nan"), 0.0
    error = (got.double() - true).norm() / true.norm()
    rounding = torch.finfo(got.dtype).eps / 2 * (8 if contender.rounds else 1)
    return float(error), contender.tolerance.gradient + rounding


def extra_bytes(call: Call, x: object) -> int:
    """Return a call's peak memory, results included, on top of its inputs."""
    call(x)  # warms up, and lets torch.compile compile
    return extra_bytes_of_warm(call, x)


def extra_bytes_of_warm(call: Callable[[Any], object], x: object) -> int:
    if DEVICE == "cuda":
        return peak_bytes(call, x, DEVICE)
    with PeakMemory() as peak:
        call(x)
    return peak.extra


def memory_of(family: str, wanted: list[Case]) -> dict[str, int]:
    """The same for all calls of a family, by "contender: case", from a process of its own."""
    names = [str(case) for case in wanted]
    command = [sys.executable, "-m", __spec__.name, family, *names]
    environment = os.environ | {
        "BENCH_THREADS": str(torch.get_num_threads()),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {family} was not measured: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _measure_memory(family: str, names: list[str]) -> dict[str, int]:
    found = {}
    by_name = {str(case): case for full in (False, True) for case in cases(full)}
    for name in names:
        case = by_name[name]
        for contender in contenders(case.operation.name):
            if contender.family != family:
                continue
            try:
                found[f"{contender.name}: {case}"] = extra_bytes(contender.ready(), case.inputs)
            except Exception as error:  # the comparison tells why, this only goes on without it
                print(f"{contender.name}: {error}", file=sys.stderr)
        case.forget()
    return found


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ["BENCH_THREADS"]))
    print(json.dumps(_measure_memory(sys.argv[1], sys.argv[2:])))
