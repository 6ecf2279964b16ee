"""The least time of a loop, from its instructions and bytes and a chip's rates.

A loop over n units (logits, or pairs of them) takes no less than the slowest of

    memory    n bytes / DRAM bandwidth
    issue     n instructions / (SMs * clock * 128): four schedulers of 32 lanes issue one each
    mufu      n special functions / (SMs * clock * 16)

at peak rates, so a measured time lies above. Left out: launches, what surrounds the loop, latency
that too few warps fail to hide, and the halved rate of some integer and comparison instructions.
"""

from __future__ import annotations

from dataclasses import dataclass

from kl_kernels.lab.codegen.sass import Loop


@dataclass(frozen=True)
class Chip:
    arch: str
    sms: int
    clock: float  # Hz, boost
    bandwidth: float  # bytes per second of DRAM
    shared: int  # bytes of shared memory per SM
    l2: int  # MiB
    tensor: float  # FLOP/s of dense bfloat16 products
    float32_lanes: int = 128  # per SM
    # CUDA Programming Guide, throughput of native arithmetic instructions: 2^x in float32, results
    # per clock and SM. Four schedulers per SM issue an instruction per clock for a warp each.
    mufu: int = 16
    issue: int = 128
    # The guide's technical specifications per compute capability.
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


# SMs and L2 from NVIDIA's architecture papers, bandwidth and dense bfloat16 products from its data
# sheets. The clock is the one
# that the data sheet's float32 rate is made of: 19.5 TFLOP/s = 108 * 64 * 2 * clock for an A100,
# 67 = 132 * 128 * 2 * clock for H100 SXM and H200, 75 = 148 * 128 * 2 * clock for a B200 (an
# eighth of HGX B200's). No data sheet has the B200's SMs and L2: they are what its driver reports.
CHIPS = {
    "a100": Chip(
        "sm_80",
        sms=108,
        clock=1.41e9,
        bandwidth=2.039e12,
        shared=164 * 1024,
        l2=40,
        tensor=312e12,
        float32_lanes=64,
    ),
    "h100": Chip(
        "sm_90", sms=132, clock=1.98e9, bandwidth=3.35e12, shared=228 * 1024, l2=50, tensor=989e12
    ),
    "h200": Chip(
        "sm_90", sms=132, clock=1.98e9, bandwidth=4.8e12, shared=228 * 1024, l2=50, tensor=989e12
    ),
    "b200": Chip(
        "sm_100", sms=148, clock=1.98e9, bandwidth=8.0e12, shared=228 * 1024, l2=126, tensor=2250e12
    ),
}

WARP = 32
REGISTER_UNIT = 256  # a warp's registers are allocated in multiples of this
RESERVED_SHARED = 1024  # bytes of shared memory that the system takes per block


def limits(loop: Loop, units: int, chip: Chip) -> dict[str, float]:
    """Seconds that each resource needs for a loop over `units`; the longest of them binds."""
    clocks = chip.sms * chip.clock
    return {
        "memory": units * loop.bytes / chip.bandwidth,
        "issue": units * loop.instructions / (clocks * chip.issue),
        "mufu": units * loop.mufu / (clocks * chip.mufu),
    }


def second_look_hits(row_bytes: int, rows_in_flight: int, chip: Chip) -> float:
    """The share of each row that the L2 still holds when the row is read again from its end.

    Assumes that data written, or read for the last time, leaves the cache at once, and the worst
    case that rows are in step, so that none makes room for another.
    """
    return min(1.0, (chip.l2 << 20) / (rows_in_flight * row_bytes))


def visit(first: Loop, second: Loop, hits: float, units: int, chip: Chip) -> float:
    """Seconds that memory needs for two looks at the same logits; the L2 has `hits` of the second.

    What the second look writes always goes to memory.
    """
    return units * (first.bytes + second.bytes - hits * first.bytes) / chip.bandwidth


def occupancy(registers: int, shared: int, num_warps: int, chip: Chip) -> float:
    """The share of an SM's warps that can be resident at once.

    The limits are a thread's `registers`, and a block's bytes of `shared` memory and warps.
    """
    per_warp = -(-registers * WARP // REGISTER_UNIT) * REGISTER_UNIT
    blocks = min(
        chip.blocks,
        chip.warps // num_warps,
        chip.registers // (per_warp * num_warps),
        chip.shared // (shared + RESERVED_SHARED),
    )
    return blocks * num_warps / chip.warps
