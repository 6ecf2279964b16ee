"""Faults of a kernel: what it did that it must not do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Fault:
    """All faults of one kind at one instruction.

    Attributes:
        kind: such as "shared race" or "global out of bounds".
        kernel: the function's name.
        line: of the PTX, from 1; 0 where no instruction is at fault.
        source: the line it was compiled from, if PTX says so.
        text: the first of them, in words.
        count: how many there were.
    """

    kind: str
    kernel: str
    line: int
    source: str
    text: str
    count: int


class Faults(list[Fault]):
    """Faults in the order in which they were found, each kind once per instruction."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[tuple[str, str, int], Fault] = {}

    def report(self, kind: str, kernel: str, line: int, source: str, text: str, count: int) -> None:
        key = kind, kernel, line
        if key in self._known:
            self._known[key].count += count
        else:
            self._known[key] = Fault(kind, kernel, line, source, text, count)
            self.append(self._known[key])
