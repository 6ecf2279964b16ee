"""Basic blocks of a function, and which registers live from one to another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from .lower import compiled
from .parse import Address, Function, Instruction, Operand, Pair, Register, Symbol, Vector

# The threads of a warp execute these together.
WHOLE_WARPS = ("shfl.sync", "redux.sync", "ldmatrix", "stmatrix", "bar.warp.sync")
LEAVING = ("ret", "exit", "trap")
WAITING = ("bar.sync", "barrier.sync", "bar.red", "barrier.cluster.wait")
# Families whose first operand is no result.
WITHOUT_RESULT = (
    "st", "stmatrix", "bra", "ret", "exit", "trap", "cp", "fence", "membar", "barrier", "prefetch",
    "griddepcontrol",
)  # fmt: skip


@dataclass
class Block:
    """Instructions that are executed one after the other."""

    index: int
    instructions: list[Instruction] = field(default_factory=list)
    end: Instruction | None = None  # a branch, an exit or a barrier; None: the next block follows
    whole_warps: bool = False  # begins with an instruction that all threads of a warp execute

    @property
    def next(self) -> int:
        return self.index + 1


class Kernel:
    """A function as blocks, each compiled when it first runs.

    Attributes:
        function: the text's.
        blocks: in the order of the text.
        labels: index of the block that each label stands before.
        live_in, live_out: names of the registers that each block takes and leaves.
        stored: names of all registers that live between blocks.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.blocks = [Block(0)]
        self.labels: dict[str, int] = {}
        for item in function.body:
            if isinstance(item, str):
                self.labels[item] = self._fresh().index
            else:
                self._append(item)
        self._fresh()  # the end of the text, to which a last branch may fall through
        self.live_in, self.live_out = self._liveness()
        self.stored = set().union(*self.live_in, *self.live_out)
        self._compiled: dict[tuple[int, bool], Callable] = {}

    @property
    def read_before_written(self) -> set[str]:
        """Registers that some path from the entry reads without having written them."""
        return self.live_in[0]

    def run(self, index: int, full: bool) -> Callable:
        """Compiled function of a block, for all threads or for some."""
        key = index, full
        if key not in self._compiled:
            self._compiled[key] = compiled(self, self.blocks[index], full)
        return self._compiled[key]

    def targets(self, block: Block) -> list[int]:
        """Blocks that may follow."""
        end = block.end
        if end is None or end.op in WAITING or end.family not in ("bra", *LEAVING):
            return [block.next]
        found = [self.target(end)] if end.family == "bra" else []
        return found if end.predicate is None else [*found, block.next]

    def target(self, branch: Instruction) -> int:
        (label,) = branch.args
        if not isinstance(label, Symbol):
            raise NotImplementedError(f"line {branch.line}: a branch to {label}")
        return self.labels[label.name]

    def _fresh(self) -> Block:
        """The last block, if nothing is in it yet; otherwise a new one."""
        last = self.blocks[-1]
        if last.instructions or last.end:
            last = Block(len(self.blocks))
            self.blocks.append(last)
        return last

    def _append(self, instruction: Instruction) -> None:
        block = self.blocks[-1]
        if block.end:
            block = self._fresh()
        if instruction.op.startswith(WHOLE_WARPS):
            first = block.instructions[0].op if block.instructions else ""
            if not first.startswith(WHOLE_WARPS):
                block = self._fresh()
                block.whole_warps = True  # its threads wait for each other here
        if instruction.family in ("bra", *LEAVING) or instruction.op.startswith(WAITING):
            block.end = instruction
        else:
            block.instructions.append(instruction)

    def _liveness(self) -> tuple[list[set[str]], list[set[str]]]:
        """Least sets that the flow allows; a predicated result may leave the old value."""
        use: list[set[str]] = []
        defined: list[set[str]] = []
        for block in self.blocks:
            used, known = set(), set()
            for instruction in [*block.instructions, *([block.end] if block.end else [])]:
                reads, writes = effects(instruction)
                used |= {register.name for register in reads} - known
                names = {register.name for register in writes}
                if instruction.predicate is None:
                    known |= names
                else:
                    used |= names - known
            use.append(used)
            defined.append(known)
        live_in, live_out = [set(names) for names in use], [set() for _ in use]
        changed = True
        while changed:
            changed = False
            for block in reversed(self.blocks):
                after = [live_in[i] for i in self.targets(block) if i < len(self.blocks)]
                out = set().union(*after)
                before = use[block.index] | (out - defined[block.index])
                if out != live_out[block.index] or before != live_in[block.index]:
                    live_out[block.index], live_in[block.index] = out, before
                    changed = True
        return live_in, live_out


def effects(instruction: Instruction) -> tuple[list[Register], list[Register]]:
    """Registers that an instruction reads and writes."""
    reads = [instruction.predicate] if instruction.predicate is not None else []
    results = 1
    if instruction.family in WITHOUT_RESULT or instruction.op in ("bar.warp.sync", "bar.sync"):
        results = 0
    for operand in instruction.args[results:]:
        reads += registers_in(operand)
    writes = [r for operand in instruction.args[:results] for r in registers_in(operand)]
    return reads, writes


def registers_in(operand: Operand | None) -> list[Register]:
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Vector | Pair):
        return [register for part in operand.parts for register in registers_in(part)]
    if isinstance(operand, Address):
        return registers_in(operand.base)
    return []
