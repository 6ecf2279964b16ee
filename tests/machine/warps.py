"""Instructions that the threads of a warp execute together: shuffles, reductions, matrices."""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from .copies import Copies
from .threads import WARP

LANES = np.arange(WARP)
REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


class Warps(Copies):
    """shfl, redux, ldmatrix, stmatrix."""

    # --- called by lowered code

    def shfl(self, kind: str, value, by, clamp, mask, m, line: int) -> tuple[ndarray, ndarray]:
        """Values of other threads, and whether each was within its segment."""
        warps, rows, present = self._warps(m)
        source, inside = sources(
            kind, self._lanes(by, rows, warps), self._lanes(clamp, rows, warps)
        )
        everyone = np.zeros((warps, WARP), np.uint32)
        everyone[rows] = value
        takes_part = present & self._named(mask, rows, warps)
        known = np.take_along_axis(takes_part, source, 1)
        lost = present & inside & ~known
        if lost.any():
            text = "a value of a thread that has exited, or that the mask leaves out"
            self.fault("shuffle", line, text, int(lost.sum()))
        taken = np.take_along_axis(everyone, np.where(inside, source, LANES), 1)
        return np.ascontiguousarray(taken[rows]), np.ascontiguousarray(inside[rows])

    def redux(self, kind: str, value: ndarray, mask, m, line: int) -> ndarray:
        """The reduction of all threads' integers."""
        warps, rows, present = self._warps(m)
        named = self._named(mask, rows, warps)
        if (present & ~named).any() or (named & ~present).any():
            self.fault("reduction", line, "the mask is not the threads that execute it")
        reduce = REDUCTIONS[kind]
        everyone = np.zeros((warps, WARP), value.dtype)
        everyone[rows] = value
        result = np.zeros(warps, value.dtype)
        for warp in range(warps):
            result[warp] = reduce.reduce(everyone[warp][present[warp]], dtype=value.dtype)
        return result[rows[0]]

    def ldmatrix(self, address: ndarray, count: int, trans: bool, m, line: int) -> list[ndarray]:
        """8 x 8 matrices of 16 bits: thread t names row t % 8 of matrix t // 8.

        It gets two neighbours of row t // 4 of each.
        """
        n = self._whole(m)
        lane = np.arange(n) % WARP
        named = None if count == 4 else lane < 8 * count
        rows = self.load_shared(address, 4, 4, named, m, line)
        matrices = np.stack(rows, 1).reshape(-1, WARP, 4)  # [warp, row of all matrices, 4]
        if trans:
            halves = matrices.view(np.uint16).reshape(-1, 4, 8, 8).swapaxes(2, 3)
            matrices = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, WARP, 4)
        return [
            np.ascontiguousarray(matrices[:, 8 * k + LANES // 4, LANES % 4]).ravel()
            for k in range(count)
        ]

    def stmatrix(self, address: ndarray, values: list[ndarray], m, line: int) -> None:
        """The inverse of `ldmatrix`."""
        n = self._whole(m)
        rows = np.zeros((n // WARP, WARP, 4), np.uint32)
        for k, value in enumerate(values):
            rows[:, 8 * k : 8 * k + 8] = value.reshape(-1, 8, 4)
        elements = [np.ascontiguousarray(rows.reshape(-1, 4)[:, j]) for j in range(4)]
        named = None if len(values) == 4 else np.arange(n) % WARP < 8 * len(values)
        self.store_shared(address, elements, 4, named, m, line)

    # ---

    def _warps(self, m: ndarray | None) -> tuple[int, tuple[ndarray, ndarray], ndarray]:
        """Warps that execute this, each thread's (warp, lane), and [warps, 32] who is there."""
        if m is None:
            warps = self.n // WARP
            rows = self.everyone // WARP, self.everyone % WARP
            return warps, rows, np.ones((warps, WARP), bool)
        numbers, warp = np.unique(m // WARP, return_inverse=True)
        rows = warp, m % WARP
        present = np.zeros((len(numbers), WARP), bool)
        present[rows] = True
        return len(numbers), rows, present

    def _whole(self, m: ndarray | None) -> int:
        n = self.n if m is None else len(m)
        if n % WARP:
            raise NotImplementedError("matrices of a warp of which some threads have exited")
        return n

    @staticmethod
    def _lanes(value, rows, warps: int) -> ndarray:  # int64 [warps, 32]
        found = np.zeros((warps, WARP), np.int64)
        found[rows] = np.asarray(value).astype(np.int64)
        return found

    def _named(self, mask, rows, warps: int) -> ndarray:  # [warps, 32]
        """Threads that the membermask of their own warp names."""
        return (self._lanes(mask, rows, warps).max(1, keepdims=True) >> LANES) & 1 != 0


def sources(kind: str, by: ndarray, clamp: ndarray) -> tuple[ndarray, ndarray]:
    """Lanes that a shuffle reads, and whether they are within the segment.

    https://docs.nvidia.com/cuda/parallel-thread-execution/#data-movement-and-conversion-instructions-shfl-sync
    """
    by, segment, clamp = by & 31, (clamp >> 8) & 31, clamp & 31
    highest, lowest = (LANES & segment) | (clamp & ~segment), LANES & segment
    if kind == "up":
        source = LANES - by
        inside = source >= highest
    elif kind == "down":
        source = LANES + by
        inside = source <= highest
    elif kind == "bfly":
        source = LANES ^ by
        inside = source <= highest
    else:
        source = lowest | (by & ~segment)
        inside = source <= highest
    return np.where(inside, source, LANES), inside
