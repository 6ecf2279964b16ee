"""Counts of what a launch executed, and of the memory traffic it asked for.

Instructions are PTX's, not those of the hardware, which ptxas makes of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray

if TYPE_CHECKING:
    from .blocks import Kernel

SECTOR = 32  # bytes that global memory is read and written in
BANKS, WORD = 32, 4  # shared memory: banks, and the bytes of one


@dataclass
class Traffic:
    """Accesses of one kind of memory at one instruction.

    Attributes:
        requests: executions of the instruction by warps.
        units: sectors of global memory; wavefronts of shared memory, of which a request takes
            more than one for more than 128 bytes, or for different words of a bank.
        n_bytes: asked for by all threads.
        conflicts: wavefronts beyond one for each 128 bytes, of shared memory.
    """

    requests: int = 0
    units: int = 0
    n_bytes: int = 0
    conflicts: int = 0

    def add(self, other: Traffic) -> None:
        self.requests += other.requests
        self.units += other.units
        self.n_bytes += other.n_bytes
        self.conflicts += other.conflicts


@dataclass
class Counters:
    """Counts by kernel.

    Attributes:
        launches: of each kernel.
        thread_instructions: executed by threads, of each kernel.
        warp_instructions: executed by warps with at least one thread.
        blocks: executions by threads, of each (kernel, block).
        traffic: by (kernel, "load" or "store", "global" or "shared", line).
        kernels: by name.
    """

    launches: Counter[str] = field(default_factory=Counter)
    thread_instructions: Counter[str] = field(default_factory=Counter)
    warp_instructions: Counter[str] = field(default_factory=Counter)
    blocks: Counter[tuple[str, int]] = field(default_factory=Counter)
    traffic: dict[tuple[str, str, str, int], Traffic] = field(default_factory=dict)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def total(self, kernel: str, access: str, space: str) -> Traffic:
        """Sum over the instructions of a kernel."""
        sums = Traffic()
        for (name, what, where, _), found in self.traffic.items():
            if (name, what, where) == (kernel, access, space):
                sums.add(found)
        return sums

    def count(
        self,
        kernel: str,
        access: str,
        space: str,
        line: int,
        at: ndarray,
        size: int,
        warps: ndarray,
    ) -> None:
        """Count an access.

        Args:
            kernel: its name.
            access: "load" or "store".
            space: "global" or "shared".
            line: of the instruction.
            at: [n] addresses.
            size: bytes that each thread asks for.
            warps: [n] number of each thread's warp.
        """
        counted = Traffic(len(np.unique(warps)), n_bytes=size * len(at))
        if space == "global":
            counted.units = sectors(at, size, warps)
        else:
            counted.units = wavefronts(at, size, warps)
            counted.conflicts = counted.units - len(np.unique(portions(size, warps)))
        self.traffic.setdefault((kernel, access, space, line), Traffic()).add(counted)


def sectors(at: ndarray, size: int, warps: ndarray) -> int:
    first, last = at // SECTOR, (at + size - 1) // SECTOR
    numbers = warps.astype(np.int64) << 44
    touched = [numbers + (first & ((1 << 44) - 1))]
    if (first != last).any():
        touched.append(numbers + (last & ((1 << 44) - 1)))
    return len(np.unique(np.concatenate(touched)))


def portions(size: int, warps: ndarray) -> ndarray:  # [n]
    """Number of the 128 bytes that each thread's access belongs to, which take a wavefront."""
    size = max(size, WORD)
    group = warps.astype(np.int64) * (size // WORD)
    if size > WORD:  # 8 and 16 bytes: halves and quarters of a warp
        rank = np.arange(len(warps)) - np.searchsorted(warps, warps)
        group = group + rank * size // (BANKS * WORD)
    return group


def wavefronts(at: ndarray, size: int, warps: ndarray) -> int:
    """The most distinct words of any bank, summed over groups of threads that ask for 128 bytes."""
    group, size = portions(size, warps), max(size, WORD)
    words = (at[:, None] // WORD + np.arange(size // WORD)).ravel()
    groups = np.repeat(group, size // WORD)
    distinct = np.unique(np.stack([groups, words % BANKS, words]), axis=1)
    banks, counts = np.unique(distinct[:2], axis=1, return_counts=True)
    starts = np.flatnonzero(np.diff(banks[0], prepend=-1))
    return int(np.maximum.reduceat(counts, starts).sum()) if len(starts) else 0
