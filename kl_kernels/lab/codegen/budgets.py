"""Budgets of the loops over the vocabulary, for bfloat16; rows are aligned unless a name says not.

In the time that the 4 bytes of a pair take, an H200 has slots for 28 instructions and 3.5 special
functions, an A100 for 38 and 4.8, a B200 for 19 and 2.3. Within these budgets memory binds, except
for a B200's running-max loop and those on mixtures.
"""

from __future__ import annotations

from dataclasses import dataclass

from kl_kernels.lab.codegen.sass import Kernel


@dataclass(frozen=True)
class Budget:
    """Per logit, or pair of a policy's and a reference's."""

    instructions: float
    mufu: float
    bytes: float  # each logit once


# A little above what Triton 3.6 to 3.9 reach, by kernel and loop.
BUDGETS = {
    ("fold: policy and reference", "fast"): Budget(15.0, 2.0, 4.0),
    # A running maximum costs an exponential per tile and model.
    ("fold: policy and reference", "running max"): Budget(23.0, 2.125, 4.0),
    ("fold: policy", "fast"): Budget(7.0, 1.0, 2.0),
    ("fold: policy", "running max"): Budget(9.0, 1.0625, 2.0),
    ("backward: KL", "tiles"): Budget(15.0, 1.0, 6.0),
    # Vectors begin where memory has them aligned: wherever a row begins, it costs the same.
    ("backward: KL, unaligned rows", "tiles"): Budget(15.0, 1.0, 6.0),
    ("backward: both KLs", "tiles"): Budget(17.0, 2.0, 6.0),
    ("backward: no KL", "tiles"): Budget(9.0, 1.0, 4.0),
    # The same loops, one after the other, without the forward KL's sum.
    ("policy loss: policy and reference", "fast"): Budget(14.0, 2.0, 4.0),
    ("policy loss: policy and reference", "running max"): Budget(21.0, 2.125, 4.0),
    ("policy loss: policy and reference", "gradient"): Budget(15.0, 1.0, 6.0),
    ("policy loss: policy", "fast"): Budget(7.0, 1.0, 2.0),
    ("policy loss: policy", "running max"): Budget(9.0, 1.0625, 2.0),
    ("policy loss: policy", "gradient"): Budget(9.0, 1.0, 4.0),
    ("mixture: whole rows", "fast"): Budget(11.0, 2.0, 4.0),
    ("mixture: whole rows", "running max"): Budget(16.0, 2.125, 4.0),
    # Bound by instructions, of which the logarithm has 17: the second look finds some of the row in
    # the L2.
    ("mixture: whole rows", "second"): Budget(41.0, 2.0, 4.0),
    ("mixture: parts", "second"): Budget(41.0, 2.0, 4.0),
    ("backward: mixture", "tiles"): Budget(36.0, 2.0, 6.0),
    # A division per tile finds the row.
    ("scale", "tiles"): Budget(9.0, 0.125, 4.0),
}
WIDTH = 16  # bytes of each load and store: the widest of one thread
# 64 registers leave half of an SM's warps resident. sm_100 schedules further ahead.
REGISTERS = {"sm_80": 64, "sm_90": 64, "sm_100": 80}


def excesses(arch: str, kernel: Kernel) -> list[str]:
    """Return a sentence for each figure of a kernel's budgeted loops that is over its budget."""
    if not kernel.loops:
        return []
    found: list[tuple[str, str, float, float]] = [
        (kernel.name, "registers", kernel.registers, REGISTERS[arch]),
        (kernel.name, "bytes of stack", kernel.stack, 0),
    ]
    narrow = []
    for name, loop in kernel.loops.items():
        where, budget = f"{kernel.name}, {name}", BUDGETS[kernel.name, name]
        found += [
            (where, "instructions", loop.instructions, budget.instructions),
            (where, "special functions", loop.mufu, budget.mufu),
            (where, "bytes", loop.bytes, budget.bytes),
            (where, "barriers", loop.barriers, 0),
            (where, "shuffles", loop.shuffles, 0),
        ]
        for what, width in (("loads", loop.load_width), ("stores", loop.store_width)):
            if width is not None and width < WIDTH:
                narrow.append(f"{where}: {what} of {width} bytes, expected {WIDTH}")
    over = [f"{where}: {n:g} {what}, budget {most:g}" for where, what, n, most in found if n > most]
    return over + narrow
