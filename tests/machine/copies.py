"""Asynchronous copies from global to shared memory: nothing is there until it was waited for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy import ndarray

from .accesses import Accesses
from .memory import pieces

UNTIL_THEN = 0xC5


@dataclass
class Copy:
    """Copies by one instruction that nobody has waited for yet."""

    threads: ndarray
    group: ndarray  # each thread's commits so far
    place: ndarray  # in shared memory
    data: ndarray  # [threads, bytes]
    line: int

    def only(self, which: ndarray) -> Copy:
        arrays = self.threads, self.group, self.place, self.data
        return Copy(*(array[which] for array in arrays), self.line)


class Copies(Accesses):
    """cp.async."""

    def __init__(self, launch, first: int, ctas: int) -> None:
        super().__init__(launch, first, ctas)
        self.commits = np.zeros(self.n, np.int64)
        self.pending: list[Copy] = []

    # --- called by lowered code

    def copy_async(self, to, source, size: int, condition, m, line: int) -> None:
        threads, at = self.active(m, condition)
        if not len(threads):
            return
        if at is not None:
            to, source = to[at], source[at]
        data = self._load_global(source, size, threads, line)
        place = self._own(to, size, threads, line)
        self._store_shared(place, np.full_like(data, UNTIL_THEN), threads, line)
        there = place >= 0
        threads, place, data = threads[there], place[there], data[there]
        pieces(self.shared_written, size)[place // size] = 0
        self.pending.append(Copy(threads, self.commits[threads].copy(), place, data, line))

    def commit(self, m: ndarray | None) -> None:
        self.commits[self.everyone if m is None else m] += 1

    def wait_group(self, keep: int, m: ndarray | None, line: int, everything: bool = False) -> None:
        """Complete all but the last `keep` groups; with `everything`, those not committed, too."""
        if not self.pending:
            return
        waiting = np.zeros(self.n, bool)
        waiting[self.everyone if m is None else m] = True
        left = []
        for copy in self.pending:
            over = everything | (copy.group < self.commits[copy.threads] - keep)
            done = waiting[copy.threads] & over
            if done.any():
                arrived = copy.only(done)
                self._store_shared(
                    arrived.place, arrived.data, arrived.threads, line, counted=False
                )
            if not done.all():
                left.append(copy.only(~done))
        self.pending = left

    # ---

    def check_copies(self) -> None:
        """At the end: a copy that nobody waited for may arrive after the CTA has exited."""
        for copy in self.pending:
            self.fault("copy never waited for", copy.line, "cp.async", len(copy.threads))
