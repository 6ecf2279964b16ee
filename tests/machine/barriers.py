"""Barriers of CTAs and of clusters: who waits, and who may go on."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from .threads import line_of
from .warps import Warps

RUNS, AT_CTA, AT_CLUSTER = 0, 1, 2


class Barriers(Warps):
    """bar.sync, bar.red, barrier.cluster; `pc` is the block that each thread executes next."""

    def __init__(self, launch, first: int, ctas: int) -> None:
        super().__init__(launch, first, ctas)
        self.pc = np.zeros(self.n, np.int64)
        self.done = len(self.kernel.blocks)  # pc of threads that have exited
        self.state = np.zeros(self.n, np.int8)
        self.answer = np.zeros(self.n, bool)  # for bar.red
        self.arrived = np.zeros(self.n, np.int64)  # phases of the cluster's barrier
        self.waited = np.zeros(self.n, np.int64)
        self.relaxed = np.zeros((ctas // self.cluster, 2), bool)  # arrivals without release

    # --- called by lowered code

    def cluster_arrive(self, m: ndarray | None, relaxed: bool) -> None:
        threads = self.everyone if m is None else m
        self.arrived[threads] += 1
        if relaxed:
            cluster = self.cta[threads] // self.cluster
            self.relaxed[cluster, self.arrived[threads] % 2] = True

    # --- called by the scheduler

    def release(self, registers: dict[str, ndarray]) -> bool:
        """Let threads go on that have waited for all others; False if there are none."""
        return self._release_ctas(registers) or self._release_clusters()

    def _release_ctas(self, registers: dict[str, ndarray]) -> bool:
        at = (self.state == AT_CTA).reshape(self.ctas, -1)
        live = (self.pc < self.done).reshape(self.ctas, -1)
        ready = (at | ~live).all(1) & at.any(1)
        for cta in np.flatnonzero(ready):
            threads = np.flatnonzero(at[cta]) + cta * self.per_cta
            self._release_cta(int(cta), threads, registers, everyone=bool(live[cta].all()))
        return bool(ready.any())

    def _release_cta(self, cta: int, threads, registers, *, everyone: bool) -> None:
        blocks = [self.kernel.blocks[b] for b in np.unique(self.pc[threads])]
        line = line_of(blocks[0].end)
        if not everyone:
            self.fault("exited at barrier", line, "some threads of the CTA had exited")
        if len(blocks) > 1:
            lines = [line_of(block.end) for block in blocks]
            self.fault("different barriers", line, f"threads of a CTA wait at lines {lines}")
        for block in blocks:
            end = block.end
            if end is not None and end.op.startswith("bar.red"):
                votes = self.answer[threads]
                value = votes.any() if ".or." in end.op else votes.all()
                name = end.args[0].name  # type: ignore[union-attr]
                if name in registers:
                    mine = threads[self.pc[threads] == block.index]
                    registers[name] = registers[name].copy()
                    registers[name][mine] = value
        self.state[threads] = RUNS
        self.pc[threads] += 1
        self.cta_barriers[cta] += 1

    def _release_clusters(self) -> bool:
        released = False
        at = (self.state == AT_CLUSTER).reshape(len(self.relaxed), -1)
        live = (self.pc < self.done).reshape(len(self.relaxed), -1)
        for cluster in np.flatnonzero(at.any(1)):
            start = cluster * at.shape[1]
            members = slice(start, start + at.shape[1])
            waiting = np.flatnonzero(at[cluster]) + start
            phase = int(self.waited[waiting].max()) + 1
            # A thread that has exited is taken to have arrived, as hardware does.
            if not (self.arrived[members][live[cluster]] >= phase).all():
                continue
            released = True
            self.state[waiting] = RUNS
            self.pc[waiting] += 1
            self.waited[waiting] += 1
            if (self.waited[members][live[cluster]] >= phase).all():
                self._order(int(cluster), phase)
        return released

    def _order(self, cluster: int, phase: int) -> None:
        """A phase is over; it orders memory unless somebody has arrived without release."""
        if not self.relaxed[cluster, phase % 2]:
            ctas = slice(cluster * self.cluster, (cluster + 1) * self.cluster)
            self.cta_barriers[ctas] += 1
            self.cluster_barriers[ctas] += 1
        self.relaxed[cluster, phase % 2] = False

    # --- at the end

    def check_exits(self) -> None:
        """Shared memory that another CTA accessed must have been there until it was done.

        All CTAs run in step here, but on a GPU one may be far ahead of another.
        """
        waited = self.waited.reshape(self.ctas, -1).min(1)
        for cta in np.flatnonzero(self.phases_needed > waited):
            text = f"CTA {cta} may exit while another accesses its shared memory"
            self.fault("shared memory of an exited CTA", 0, text)

    def check_waits(self) -> None:
        if (self.state != RUNS).any():
            waiting = np.flatnonzero(self.state != RUNS)
            lines = sorted({line_of(self.kernel.blocks[b].end) for b in self.pc[waiting]})
            text = f"{len(waiting)} threads wait for ever, at lines {lines}"
            self.fault("deadlock", lines[0], text)
        if (self.arrived != self.waited).any():
            threads = int((self.arrived != self.waited).sum())
            self.fault("cluster barrier", 0, f"{threads} threads arrived and did not wait")
