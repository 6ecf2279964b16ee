"""Races in global memory, whose records begin when a buffer is first written to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import races
from .memory import Buffer, Pages

if TYPE_CHECKING:
    from .accesses import Accesses


class Reads:
    """Global reads of a launch, kept until a write to the same buffer makes them matter.

    Most buffers are only read, and need no records at all.
    """

    LIMIT = 1 << 22  # accesses that may wait

    def __init__(self) -> None:
        self._waiting: dict[str, list[tuple]] = {}
        self._records: dict[str, Pages] = {}
        self._n = 0

    def note(self, buffer: Buffer, offset, size: int, group: Accesses, threads, line: int) -> None:
        if buffer.name in self._records:
            self._check(buffer, offset, size, group, threads, line, store=False)
            return
        entry = offset, size, group.who(threads)
        self._waiting.setdefault(buffer.name, []).append(entry)
        self._n += len(offset)
        if self._n > self.LIMIT:  # the buffer that is read most: it is probably read only
            most = max(self._waiting, key=lambda name: sum(len(e[0]) for e in self._waiting[name]))
            self._n -= sum(len(entry[0]) for entry in self._waiting[most])
            self._record(group.launch.memory.buffers[most])

    def store(self, buffer: Buffer, offset, size: int, group: Accesses, threads, line: int) -> None:
        if buffer.name not in self._records:
            self._record(buffer)
        self._check(buffer, offset, size, group, threads, line, store=True)

    def _record(self, buffer: Buffer) -> None:
        pages = self._records[buffer.name] = Pages(len(buffer.data), **races.FIELDS)
        for offset, size, threads in self._waiting.pop(buffer.name, []):
            index = pages.index((offset[:, None] + np.arange(size)).ravel())
            races.check(pages.arrays, index, threads.repeated(size), store=False)

    def _check(
        self, buffer, offset, size: int, group: Accesses, threads, line: int, *, store
    ) -> None:
        pages = self._records[buffer.name]
        index = pages.index((offset[:, None] + np.arange(size)).ravel())
        who = group.who(threads).repeated(size)
        text = races.check(pages.arrays, index, who, store=store)
        if text:
            group.fault("global race", line, f"{text}, in {buffer.name}")
