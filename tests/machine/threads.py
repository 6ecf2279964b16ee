"""Threads of some CTAs that run together: who they are, and what instructions ask of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

from .parse import Instruction
from .races import Threads, time_of

if TYPE_CHECKING:
    from .machine import Launch

WARP = 32


class Group:
    """CTAs of a launch, whole clusters of them, with one value per thread in every array.

    Args:
        launch: what they are CTAs of.
        first: number of the first CTA.
        ctas: how many there are.
    """

    def __init__(self, launch: Launch, first: int, ctas: int) -> None:
        self.launch = launch
        self.kernel, self.faults, self.counters = launch.kernel, launch.faults, launch.counters
        self.per_cta, self.cluster = launch.threads, launch.cluster
        self.ctas, self.n = ctas, ctas * launch.threads
        everyone = np.arange(self.n)
        self.everyone = everyone
        self.tid = (everyone % launch.threads).astype(np.uint32)
        self.cta = everyone // launch.threads  # from 0 in this group
        self.ctaid = (self.cta + first).astype(np.uint32)
        self.number = (everyone + first * launch.threads).astype(np.int32)  # in the grid
        # Barriers passed: by each CTA, by each CTA's cluster, by each thread's warp.
        self.cta_barriers = np.zeros(ctas, np.int64)
        self.cluster_barriers = np.zeros(ctas, np.int64)
        self.warp_barriers = np.zeros(self.n, np.int64)

    def who(self, threads: ndarray) -> Threads:
        cta = self.cta[threads]
        time = time_of(
            self.cluster_barriers[cta], self.cta_barriers[cta], self.warp_barriers[threads]
        )
        per_cluster = self.per_cta * self.cluster
        return Threads(self.number[threads], time, self.per_cta, per_cluster)

    def fault(self, kind: str, line: int, text: str, count: int = 1) -> None:
        source = self.launch.source(line)
        self.faults.report(kind, self.kernel.function.name, line, source, text, count)

    def active(
        self, m: ndarray | None, condition: ndarray | None
    ) -> tuple[ndarray, ndarray | None]:
        """Threads that execute an instruction, and their places among those of the block.

        The places are None where all do.
        """
        threads = self.everyone if m is None else m
        if condition is None:
            return threads, None
        at = np.flatnonzero(condition)
        return threads[at], at

    # --- called by lowered code

    def special(self, name: str, m: ndarray | None) -> ndarray:
        """Value of a special register, uint32."""
        if name == "%tid.x":
            value = self.tid
        elif name == "%ctaid.x":
            value = self.ctaid
        elif name == "%laneid":
            value = self.tid % np.uint32(WARP)
        elif name == "%cluster_ctarank":
            value = self.ctaid % np.uint32(self.cluster)
        else:
            value = np.full(self.n, self._constant(name), np.uint32)
        return value if m is None else value[m]

    def _constant(self, name: str) -> int:
        known = {
            "%ntid.x": self.per_cta,
            "%nctaid.x": self.launch.grid,
            "%cluster_nctarank": self.cluster,
            **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0),
            **dict.fromkeys(("%ntid.y", "%ntid.z", "%nctaid.y", "%nctaid.z"), 1),
        }
        if name not in known:
            raise NotImplementedError(f"special register {name}")
        return known[name]

    def param(self, offset: int, kind: type) -> np.generic:
        size = np.dtype(kind).itemsize
        value: np.generic = self.launch.parameters[offset : offset + size].view(kind)[0]
        return value

    def warp_barrier(self, m: ndarray | None) -> None:
        self.warp_barriers[self.everyone if m is None else m] += 1


def line_of(instruction: Instruction | None) -> int:
    return 0 if instruction is None else instruction.line
