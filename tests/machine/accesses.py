"""Loads and stores of threads, each checked: whether the bytes exist, were written, and race."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray

from . import races
from .memory import ONES, Buffer, pieces
from .threads import Group

Values = list[ndarray]  # one array for each element of a vector, uint [threads]
# Generic addresses: shared memory is a window; CTA r of the cluster begins at (r + 1) << RANK in
# it, and the thread's own at 0.
WINDOW, RANK = 1 << 56, 40
GARBAGE = 0xA5


class Accesses(Group):
    """Global memory of the launch, and shared memory of these CTAs."""

    WINDOW = np.uint64(WINDOW)

    def __init__(self, launch, first: int, ctas: int) -> None:
        super().__init__(launch, first, ctas)
        # Garbage, so that what is read before it is written is not 0 by chance.
        self.stride = -(-max(launch.shared_bytes, 1) // 64) * 64  # a CTA's shared memory, in bytes
        n_bytes = self.stride * ctas
        garbage = np.random.default_rng(launch.seed).bytes(n_bytes)
        self.shared = np.frombuffer(garbage, np.uint8).copy()
        self.shared_written = np.zeros(n_bytes, np.uint8)
        self.shared_records = {name: np.zeros(n_bytes, kind) for name, kind in races.FIELDS.items()}
        # Phases of the cluster's barrier that must be over before a CTA may exit.
        self.phases_needed = np.zeros(ctas, np.int64)

    # --- called by lowered code

    def load_global(self, address, size, count, condition, m, line, used=None) -> Values:
        return self._load(self._load_global, address, size, count, condition, m, line, used)

    def load_shared(self, address, size, count, condition, m, line, used=None) -> Values:
        return self._load(self._load_own, address, size, count, condition, m, line, used)

    def load_generic(self, address, size, count, condition, m, line, used=None) -> Values:
        return self._load(self._load_any, address, size, count, condition, m, line, used)

    def store_global(self, address, values: Values, size, condition, m, line) -> None:
        threads, at = self.active(m, condition)
        if at is not None:
            address, values = address[at], [value[at] for value in values]
        self._store_global(address, bytes_of(values), threads, line)

    def store_shared(self, address, values: Values, size, condition, m, line) -> None:
        threads, at = self.active(m, condition)
        if at is not None:
            address, values = address[at], [value[at] for value in values]
        data = bytes_of(values)
        place = self._own(address, data.shape[1] if len(data) else size, threads, line)
        self._store_shared(place, data, threads, line)

    def store_generic(self, address, values: Values, size, condition, m, line) -> None:
        threads, at = self.active(m, condition)
        if at is not None:
            address, values = address[at], [value[at] for value in values]
        data, shared = bytes_of(values), address >= WINDOW
        if (~shared).any():
            self._store_global(address[~shared], data[~shared], threads[~shared], line)
        if shared.any():
            place = self._in_window(address[shared], data.shape[1], threads[shared], line)
            self._store_shared(place, data[shared], threads[shared], line)

    def to_shared(self, address: ndarray, m) -> ndarray:
        return address - self.WINDOW

    def mapa(self, address: ndarray, rank: ndarray, m, line: int) -> ndarray:
        if (rank >= self.cluster).any():
            self.fault("mapa", line, f"rank {rank.max()} of {self.cluster}")
            rank = rank % np.uint32(self.cluster)
        return address + ((rank.astype(np.uint64) + np.uint64(1)) << np.uint64(RANK))

    def _load(self, load, address, size, count, condition, m, line, used) -> Values:
        """Load for the threads that execute it; bit i of `used` is whether byte i matters."""
        threads, at = self.active(m, condition)
        found = load(address if at is None else address[at], size * count, threads, line, used)
        return self._spread(found, size, count, at, self.n if m is None else len(m))

    def _load_any(self, address: ndarray, size: int, threads, line: int, used) -> ndarray:
        found = np.zeros((len(threads), size), np.uint8)
        shared = address >= WINDOW
        for which, load in ((shared, self._load_window), (~shared, self._load_global)):
            if which.any():
                found[which] = load(address[which], size, threads[which], line, used)
        return found

    # --- global memory

    def _load_global(
        self, address: ndarray, size: int, threads: ndarray, line: int, used: int | None = None
    ) -> ndarray:
        result = np.full((len(threads), size), GARBAGE, np.uint8)
        if not len(threads):
            return result
        self._count("load", "global", line, address, size, threads)
        for buffer, at, offset in self.launch.memory.split(address):
            who = threads[at]
            good = self._exists(buffer, address[at], offset, size, who, line, "load", used)
            if buffer is None:
                continue
            if not good.all():
                which = np.flatnonzero(good)
                at = which if isinstance(at, slice) else at[which]
                offset, who = offset[which], who[which]
            written = every(buffer.was_written, offset, size, used)
            if not written.all():
                self._uninitialised("global", line, who, written)
            self.launch.reads.note(buffer, offset, size, self, who, line)
            result[at] = buffer.view(size)[buffer.place(offset, size)]
        return result

    def _store_global(self, address: ndarray, data: ndarray, threads: ndarray, line: int) -> None:
        if not len(threads):
            return
        size = data.shape[1]
        self._count("store", "global", line, address, size, threads)
        for buffer, at, offset in self.launch.memory.split(address):
            who, values = threads[at], data[at]
            good = self._exists(buffer, address[at], offset, size, who, line, "store")
            if buffer is None:
                continue
            if not good.all():
                offset, who, values = offset[good], who[good], values[good]
            self.launch.reads.store(buffer, offset, size, self, who, line)
            view, place = buffer.view(size), buffer.place(offset, size)
            view[place] = values
            self._compare("global", line, view[place], values, who)
            buffer.set_written(offset, size)

    def _exists(
        self,
        buffer: Buffer | None,
        address: ndarray,
        offset: ndarray,
        size: int,
        threads: ndarray,
        line: int,
        access: str,
        used: int | None = None,
    ) -> ndarray:
        """Whether each access is aligned, and to bytes that exist; if not, that is a fault."""
        if buffer is None:
            good = np.zeros(len(address), bool)
        else:
            good = (offset >= 0) & (offset + size <= len(buffer.data))
            good &= every(buffer.exists, offset, size, used)
        aligned = address % size == 0
        if not aligned.all():
            at = np.flatnonzero(~aligned)
            text = f"{access} of {size} bytes at {address[at[0]]:#x} by thread {threads[at[0]]}"
            self.fault("global misaligned", line, text, len(at))
        if not good.all():
            at = np.flatnonzero(~good)
            where = f"byte {offset[at[0]]} of {buffer.name}" if buffer else f"{address[at[0]]:#x}"
            text = f"{access} of {size} bytes at {where} by thread {self.number[threads[at[0]]]}"
            self.fault("global out of bounds", line, text, len(at))
        return good & aligned

    # --- shared memory

    def _own(self, address: ndarray, size: int, threads: ndarray, line: int) -> ndarray:
        """Places in `shared` of addresses in the threads' own CTAs."""
        return self._place(address, size, self.cta[threads], threads, line)

    def _in_window(self, address: ndarray, size: int, threads: ndarray, line: int) -> ndarray:
        """Places in `shared` of generic addresses, in CTAs of the cluster."""
        address = address - WINDOW
        rank, offset = address >> RANK, address & ((1 << RANK) - 1)
        own = self.cta[threads]
        cta = np.where(rank == 0, own, own // self.cluster * self.cluster + rank - 1)
        remote = cta != own
        if remote.any():
            # Until this thread has arrived once more, that CTA must be there.
            np.maximum.at(self.phases_needed, cta[remote], self.arrived[threads[remote]] + 1)
        return self._place(offset, size, cta, threads, line)

    def _place(self, offset, size: int, cta, threads: ndarray, line: int) -> ndarray:
        """Places in `shared`, -1 where there is none."""
        bad = (offset < 0) | (offset + size > self.launch.shared_bytes)
        if bad.any():
            at = np.flatnonzero(bad)
            text = f"{size} bytes at {offset[at[0]]} by thread {self.number[threads[at[0]]]}"
            self.fault("shared out of bounds", line, text, len(at))
        if (offset % size).any():
            self.fault(
                "shared misaligned", line, f"{size} bytes at {offset[offset % size != 0][0]}"
            )
            offset = offset - offset % size
        return np.where(bad, -1, offset + cta * self.stride)

    def _load_own(self, address: ndarray, size: int, threads, line: int, used) -> ndarray:
        return self._load_shared(self._own(address, size, threads, line), size, threads, line, used)

    def _load_window(self, address: ndarray, size: int, threads, line: int, used) -> ndarray:
        place = self._in_window(address, size, threads, line)
        return self._load_shared(place, size, threads, line, used)

    def _load_shared(
        self, place: ndarray, size: int, threads: ndarray, line: int, used: int | None = None
    ) -> ndarray:
        result = np.full((len(threads), size), GARBAGE, np.uint8)
        at = np.flatnonzero(place >= 0)
        place, threads = place[at], threads[at]
        if len(at):
            self._count("load", "shared", line, place, size, threads)
            written = every(self._was_written, place, size, used)
            if not written.all():
                self._uninitialised("shared", line, threads, written)
            self._race_shared(place, size, threads, line, store=False, used=used)
            result[at] = self.shared.reshape(-1, size)[place // size]
        return result

    def _was_written(self, place: ndarray, size: int) -> ndarray:
        marks = pieces(self.shared_written, size)[place // size].reshape(len(place), -1)
        return (marks == ONES[size]).all(1)

    def _store_shared(
        self, place: ndarray, data: ndarray, threads: ndarray, line: int, *, counted: bool = True
    ) -> None:
        at = np.flatnonzero(place >= 0)
        if not len(at):
            return
        place, data, threads, size = place[at], data[at], threads[at], data.shape[1]
        if counted:
            self._count("store", "shared", line, place, size, threads)
        self._race_shared(place, size, threads, line, store=True)
        view = self.shared.reshape(-1, size)
        view[place // size] = data
        self._compare("shared", line, view[place // size], data, threads)
        pieces(self.shared_written, size)[place // size] = ONES[size]

    def _race_shared(
        self, place: ndarray, size: int, threads, line: int, *, store: bool, used: int | None = None
    ) -> None:
        which = bytes_in(size, used)
        index = (place[:, None] + which).ravel()
        by = self.who(threads).repeated(len(which))
        text = races.check(self.shared_records, index, by, store=store)
        if text:
            self.fault("shared race", line, text)

    # --- both

    def _uninitialised(self, space: str, line: int, threads: ndarray, written: ndarray) -> None:
        at = np.flatnonzero(~written)
        self.fault(
            f"{space} uninitialised", line, f"load by thread {self.number[threads[at[0]]]}", len(at)
        )

    def _compare(self, space: str, line: int, kept: ndarray, meant: ndarray, threads) -> None:
        """Find values that another thread of the same instruction has overwritten by others."""
        lost = (kept != meant).any(1)
        if lost.any():
            at = np.flatnonzero(lost)
            text = f"{meant[at[0]].tolist()} by thread {self.number[threads[at[0]]]}, kept is "
            self.fault(f"{space} double write", line, f"{text}{kept[at[0]].tolist()}", len(at))

    def _count(self, access: str, space: str, line: int, at, size: int, threads: ndarray) -> None:
        if self.launch.counting:
            warps = self.number[threads] // 32
            self.counters.count(self.kernel.function.name, access, space, line, at, size, warps)

    @staticmethod
    def _spread(found: ndarray, size: int, count: int, at: ndarray | None, n: int) -> Values:
        """Bytes [threads, size * count] as values of the block's n threads."""
        values = found.view(f"u{size}") if size > 1 else found
        if at is not None:
            everyone = np.full((n, count), GARBAGE, f"u{size}")
            everyone[at] = values
            values = everyone
        return [np.ascontiguousarray(values[:, element]) for element in range(count)]


def bytes_in(size: int, used: int | None) -> ndarray:
    """The bytes of an access that matter."""
    everything = np.arange(size)
    return everything if used is None else everything[(used >> everything) & 1 == 1]


def every(holds: Callable[[ndarray, int], ndarray], at: ndarray, size: int, used: int | None):
    """Whether something holds of all bytes that matter, of each access."""
    if used is None:
        return holds(at, size)
    return np.logical_and.reduce([holds(at + byte, 1) for byte in bytes_in(size, used)])


def bytes_of(values: Values) -> ndarray:  # [threads, bytes]
    together = np.stack(values, 1)
    size = together.shape[1] * together.itemsize
    return together.view(np.uint8).reshape(len(together), size)
