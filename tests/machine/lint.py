"""Faults that can be read from the instructions of a kernel, without running it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .parse import Function, Immediate, Instruction, Operand, Pair, Register, Special, Vector

# Number of the instruction that computes a value; a constant; a register that nobody writes to.
Root = int | Immediate | Special | Register


class Origins:
    """Where the values of registers may come from, through moves, packed and unpacked ones too.

    All that a function ever writes to a register counts, on whatever path: compilers give almost
    every value a register of its own.
    """

    def __init__(self, function: Function) -> None:
        self.instructions: dict[int, Instruction] = {}
        self.writers: dict[Register, list[int]] = defaultdict(list)
        for number, item in enumerate(function.body):
            if isinstance(item, Instruction) and item.args:
                self.instructions[number] = item
                for register in registers_in(item.args[0]):
                    self.writers[register].append(number)

    def of(self, operand: Operand | None) -> set[Root]:
        """Find all values that an operand may be a copy of."""
        found: set[Root] = set()
        seen: set[Register] = set()
        left = [operand]
        while left:
            at = left.pop()
            if isinstance(at, Vector | Pair):
                left += at.parts
            elif isinstance(at, Immediate | Special):
                found.add(at)
            elif isinstance(at, Register) and at not in seen:
                seen.add(at)
                if not self.writers[at]:
                    found.add(at)
                for number in self.writers[at]:
                    writer = self.instructions[number]
                    if writer.family == "mov":
                        left.append(writer.args[1])
                    else:
                        found.add(number)
        return found

    def writers_of(self, operand: Operand | None, family: str) -> Iterator[Instruction]:
        """Instructions of a family that may compute an operand."""
        for number in self.of(operand):
            if isinstance(number, int) and self.instructions[number].family == family:
                yield self.instructions[number]


def asymmetric_butterflies(function: Function) -> list[int]:
    """Lines of `fma(a, b, shfl(a * b))`, of any precision.

    One thread of a butterfly then rounds its own product and not its partner's, and the partner the
    other way round: they disagree on their sum in the last bit, where it must be one number.

    >>> from .parse import parse
    >>> kernel = '''.entry f() { .reg .f32 %f<9>;
    ...   mul.f32 %f3, %f1, %f2;
    ...   shfl.sync.bfly.b32 %f4, %f3, 16, 31, -1;
    ...   fma.rn.f32 %f5, %f2, %f1, %f4; }'''
    >>> asymmetric_butterflies(parse(kernel)["f"])
    [4]
    """
    origins = Origins(function)
    found = []
    for instruction in origins.instructions.values():
        if instruction.family != "fma":
            continue
        _, a, b, c = instruction.args
        factors = origins.of(a), origins.of(b)
        products = [
            [origins.of(factor) for factor in product.args[1:]]
            for shuffle in origins.writers_of(c, "shfl")
            for product in origins.writers_of(shuffle.args[1], "mul")
        ]
        if any(
            (x & factors[0] and y & factors[1]) or (x & factors[1] and y & factors[0])
            for x, y in products
        ):
            found.append(instruction.line)
    return found


def registers_in(operand: Operand | None) -> list[Register]:
    parts = operand.parts if isinstance(operand, Vector | Pair) else (operand,)
    return [part for part in parts if isinstance(part, Register)]
