"""Memory bandwidth of the simplest kernels on this device, the ceilings for all others."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.common.timing import Replay, replay

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    @triton.jit
    def read_kernel(source_ptr, sums_ptr, n_tiles, TILE: tl.constexpr):
        """Each program adds up `n_tiles` tiles, 16 bytes per thread and load."""
        start = tl.program_id(0).to(tl.int64) * n_tiles * TILE
        offsets = tl.arange(0, TILE)
        total = tl.zeros((TILE,), tl.int32)
        for tile in range(n_tiles):
            total += tl.load(source_ptr + start + tile * TILE + offsets)
        tl.store(sums_ptr + tl.program_id(0), tl.sum(total, 0))


TILE, TILES_PER_PROGRAM, NUM_WARPS = 4096, 16, 8


def read_by_triton(source: Tensor, sums: Tensor) -> None:
    n_programs = source.numel() // (TILE * TILES_PER_PROGRAM)
    read_kernel[(n_programs,)](source, sums, TILES_PER_PROGRAM, TILE, num_warps=NUM_WARPS)


def check_read(device: str) -> None:
    source = torch.arange(2 * TILE * TILES_PER_PROGRAM, dtype=torch.int32, device=device) % 1000
    sums = torch.zeros(2, dtype=torch.int32, device=device)
    read_by_triton(source, sums)
    if not torch.equal(sums.long(), source.view(2, -1).sum(1)):
        raise RuntimeError("the kernel that measures the read ceiling does not read everything")


def ceilings(device: str, n_bytes: int, turns: int = 7) -> dict[str, dict[str, float]]:
    """Bytes per second: the best of a few kernels each for 1 read, 1 read + 1 write, 2 + 1.

    Medians; counted bytes are read plus written. `n_bytes` of each tensor, many times the cache.
    """
    source = torch.randint(1 << 20, (n_bytes // 4,), dtype=torch.int32, device=device)
    other, target = source.flip(0), torch.empty_like(source)
    numbers = source.view(torch.float32)
    sums = torch.empty(n_bytes // 4 // TILE // TILES_PER_PROGRAM, dtype=torch.int32, device=device)
    jobs: dict[str, tuple[int, dict[str, Callable[[Any], Any]]]] = {
        "read": (
            1,
            {
                "torch.sum": lambda _: numbers.sum(),
                "torch.amax": lambda _: numbers.amax(),
            },
        ),
        "copy": (
            2,
            {
                "Tensor.copy_": lambda _: target.copy_(source),
                "torch.neg": lambda _: torch.neg(source, out=target),
            },
        ),
        "add": (3, {"torch.add": lambda _: torch.add(source, other, out=target)}),
    }
    if device == "cuda":
        check_read(device)
        jobs["read"][1]["triton"] = lambda _: read_by_triton(source, sums)
    found = {}
    for job, (passes, kernels) in jobs.items():
        found[job] = {
            name: passes * n_bytes / _median(replay(kernel, [None], 4, device), turns)
            for name, kernel in kernels.items()
        }
    return found


def product_seconds(
    hidden: Tensor,  # [N, d]
    weight: Tensor,  # [V, d]
    turns: int = 7,
) -> dict[str, float]:
    """Medians of the three products of a linear head, whole and in the factors' dtype."""
    tile = torch.empty(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)
    products: dict[str, Callable[[Any], Any]] = {
        "logits": lambda _: torch.mm(hidden, weight.T, out=tile),
        "hidden": lambda _: torch.mm(tile, weight, out=grad_hidden),
        "weight": lambda _: torch.mm(tile.T, hidden, out=grad_weight),
    }
    with torch.no_grad():
        return {
            name: _median(replay(product, [None], 1, hidden.device.type), turns)
            for name, product in products.items()
        }


def _median(ready: Replay, turns: int) -> float:
    return statistics.median(ready() for _ in range(turns))
