"""Reading `cuobjdump -sass -res-usage`: what a kernel occupies, and what its loops consist of."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]+?)\s*;")
PREDICATE = re.compile(r"^@!?U?P\w+\s+")
BRANCH = re.compile(r"^BRA\b.*?0x([0-9a-f]+)")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
# Bytes one thread loads or stores at once, by the part of the opcode that says so; 4 if none does.
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}


@dataclass(frozen=True)
class Loop:
    """A loop over the vocabulary. A unit is a logit, or a pair of a policy's and a reference's."""

    opcodes: Counter[str]  # in one iteration of one thread
    units: int  # per iteration of one thread

    def count(self, prefix: str = "") -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    @property
    def instructions(self) -> float:  # per unit, as are the next two
        return self.count() / self.units

    @property
    def mufu(self) -> float:
        """Special functions: exponentials run at an eighth of the rate of the rest."""
        return self.count("MUFU") / self.units

    @property
    def bytes(self) -> float:
        """Loaded from and stored to global memory."""
        return sum(self._widths("LDG.") + self._widths("STG.")) / self.units

    @property
    def read(self) -> float:
        """Count the bytes loaded, without those stored."""
        return sum(self._widths("LDG.")) / self.units

    @property
    def load_width(self) -> int | None:
        """Bytes of the narrowest load; None: there is none."""
        return min(self._widths("LDG."), default=None)

    @property
    def widest_load(self) -> int:
        return max(self._widths("LDG."), default=0)

    @property
    def store_width(self) -> int | None:
        return min(self._widths("STG."), default=None)

    @property
    def barriers(self) -> int:  # per iteration
        return self.count("BAR.")

    @property
    def shuffles(self) -> int:  # per iteration
        return self.count("SHFL")

    def _widths(self, prefix: str) -> list[int]:
        """Bytes of each access."""
        widths = []
        for opcode, n in self.opcodes.items():
            if opcode.startswith(prefix):
                named = [WIDTHS[part] for part in opcode.split(".") if part in WIDTHS]
                widths += n * (named or [4])[:1]
        return widths


@dataclass(frozen=True)
class Kernel:
    name: str
    registers: int  # per thread
    stack: int  # bytes of a thread; more than 0: registers spilled
    shared: int  # bytes of a block
    num_warps: int  # per block
    loops: dict[str, Loop]  # over the vocabulary


def usage(listing: str) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack."""
    found = USAGE.search(listing)
    if found is None:
        raise RuntimeError(f"cuobjdump reports no registers: {listing[:200]!r}")
    return int(found[1]), int(found[2])


def loops(listing: str, units: int) -> list[Loop]:
    """The innermost loops that read global memory, in program order.

    A loop is the code from a backward branch's target to the branch. What surrounds others is no
    loop over the vocabulary: code that the compiler moved behind the kernel's end jumps back, too.
    """
    code = _code(listing)
    index = {at: i for i, (at, _) in enumerate(code)}
    found: list[Loop] = []
    last = -1  # where the last innermost loop starts
    for i, (_, text) in enumerate(code):
        branch = BRANCH.search(text)
        start = index.get(int(branch[1], 16), i) if branch else i
        # The branch to itself that ends every kernel is no loop.
        if last < start < i:
            last = start
            found.append(Loop(Counter(text.split()[0] for _, text in code[start : i + 1]), units))
    return [loop for loop in found if loop.count("LDG.")]


def program(listing: str, units: int) -> Loop:
    """Return all instructions of a kernel without loops, without the padding at its end."""
    opcodes = [text.split()[0] for at, text in _code(listing) if not _is_branch_to_itself(at, text)]
    return Loop(Counter(opcode for opcode in opcodes if opcode != "NOP"), units)


def _code(listing: str) -> list[tuple[int, str]]:
    """Addresses and instructions, without their predicates."""
    return [(int(at, 16), PREDICATE.sub("", text)) for at, text in INSTRUCTION.findall(listing)]


def _is_branch_to_itself(at: int, text: str) -> bool:
    branch = BRANCH.search(text)
    return branch is not None and int(branch[1], 16) == at
