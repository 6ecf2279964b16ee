"""Predicted times of operations on a chip, and the least that they could take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from kl_kernels.lab.codegen.chips import CHIPS, Chip
from kl_kernels.lab.cost.ledger import Operation

# Shares of a data sheet's rates that large products and long copies reach: 790 of 989 TFLOP/s in
# bfloat16 and 4.3 of 4.8 TB/s, measured on an H200.
PRODUCT_SHARE = 0.8
MEMORY_SHARE = 0.9
# Seconds, assumed: a kernel's beginning and end on the GPU, and what the host does for a call of
# torch, for one of ours (Triton's launchers), and while it waits.
KERNEL = 2e-6
HOST_CALL = 5e-6
HOST_CALL_OF_OURS = 60e-6
HOST_WAIT = 20e-6


@dataclass(frozen=True)
class Rates:
    """FLOP/s of products by the dtype of their factors, and bytes/s."""

    product: dict[str, float]
    memory: float


def rates(name: str) -> Rates:
    """Rates that a chip of `codegen` reaches."""
    chip: Chip = CHIPS[name]
    narrow = chip.tensor * PRODUCT_SHARE
    # Two FLOP per clock and float32 lane; products of float32 do not use tensor cores unless asked.
    float32 = chip.sms * chip.float32_lanes * 2 * chip.clock * PRODUCT_SHARE
    return Rates(
        {"bfloat16": narrow, "float16": narrow, "float32": float32, "float64": float32 / 2},
        chip.bandwidth * MEMORY_SHARE,
    )


def seconds(operation: Operation, at: Rates) -> float:
    """Time on the GPU: the slower of arithmetic and memory."""
    arithmetic = operation.flops / at.product.get(operation.operand_dtype, float("inf"))
    return max(arithmetic, operation.bytes / at.memory) + operation.launches * KERNEL


def host_seconds(operation: Operation) -> float:
    call = HOST_CALL_OF_OURS if operation.is_ours else HOST_CALL
    return call + operation.host_syncs * HOST_WAIT


def predicted(operations: Iterable[Operation], at: Rates) -> float:
    """Seconds of a call: the host's or the GPU's, whichever is longer."""
    listed = list(operations)
    return max(sum(seconds(o, at) for o in listed), sum(map(host_seconds, listed)))


def flops_by_dtype(operations: Iterable[Operation]) -> dict[str, int]:
    """FLOP of matrix products by the dtype of their factors."""
    found: dict[str, int] = defaultdict(int)
    for operation in operations:
        if operation.flops:
            found[operation.operand_dtype] += operation.flops
    return dict(found)
