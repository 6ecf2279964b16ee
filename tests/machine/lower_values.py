"""Operands and results of a block of instructions, as expressions on numpy arrays.

A register lives under its own name as an array of one value per thread, in whatever type was last
written; it is reread as another type of its width without a copy. Between blocks registers are
unsigned integers or booleans (`CANONICAL`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .parse import Address, Immediate, Instruction, Operand, Register, Special, Symbol

if TYPE_CHECKING:
    from .blocks import Block, Kernel

# Types by the kind of number and its bytes; "b1" is a predicate.
NUMPY = {
    "b1": np.bool_, "u1": np.uint8, "i1": np.int8,
    "u2": np.uint16, "i2": np.int16, "f2": np.float16,
    "u4": np.uint32, "i4": np.int32, "f4": np.float32, "u8": np.uint64, "i8": np.int64,
    "f8": np.float64,
}  # fmt: skip
# PTX's types; halves and pairs of them are bits, which only conversions look into.
TYPES = {
    "pred": "b1", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8",
    "f64": "f8", "f16": "u2", "bf16": "u2", "f16x2": "u4", "bf16x2": "u4",
}  # fmt: skip
WIDER = {"i2": "i4", "u2": "u4", "i4": "i8", "u4": "u8"}
CANONICAL = {1: "b1", 2: "u2", 4: "u4", 8: "u8"}


def size_of(kind: str) -> int:
    """Bytes of a type.

    >>> size_of("f4")
    4
    """
    return int(kind[1])


class Values:
    """Lines of Python that a block becomes, and what is known of its registers meanwhile."""

    def __init__(self, kernel: Kernel, block: Block) -> None:
        self.kernel, self.block = kernel, block
        self.lines: list[str] = []
        self.constants: dict[tuple[str, bytes], tuple[str, np.generic]] = {}
        self.kinds: dict[str, str] = {}  # by register, as read or written so far
        self.needed: dict[str, None] = {}  # registers read before they are written, in order
        self.written: dict[str, None] = {}

    # --- operands

    def constant(self, value: np.generic) -> str:
        key = value.dtype.str, value.tobytes()
        if key not in self.constants:
            self.constants[key] = f"K{len(self.constants)}", value
        return self.constants[key][0]

    def integer(self, value: int, kind: str) -> str:
        size = size_of(kind)
        bits = np.array(value & (2 ** (8 * size) - 1), f"u{size}")
        return self.constant(bits.view(NUMPY[kind])[()])

    def immediate(self, operand: Immediate, kind: str) -> str:
        if operand.kind == "int":
            if kind == "b1":
                return str(bool(operand.bits))
            if kind[0] == "f":
                raise NotImplementedError(f"an integer as {kind}")
            return self.integer(operand.bits, kind)
        size = 4 if operand.kind == "f32" else 8
        if kind[0] != "f":
            if size_of(kind) != size:
                raise NotImplementedError(f"{operand.kind} as {kind}")
            return self.integer(operand.bits, kind)
        value = np.array(operand.bits, f"u{size}").view(f"f{size}")
        return self.constant(value.astype(NUMPY[kind])[()])

    def read(self, operand: Operand | None, kind: str) -> str:
        """Expression of an operand in a type; constants are scalars."""
        if isinstance(operand, Immediate):
            return self.immediate(operand, kind)
        if isinstance(operand, Special):
            return f"C.special({operand.name!r}, m).view({kind})"
        if isinstance(operand, Symbol):
            return self.integer(self.shared_offset(operand), kind)
        if not isinstance(operand, Register):
            raise NotImplementedError(f"operand {operand}")
        if operand.name not in self.kinds:
            self.needed[operand.name] = None
            self.kinds[operand.name] = CANONICAL[operand.width]
        have = self.kinds[operand.name]
        if have == kind:
            return operand.name
        if "b1" in (have, kind) or size_of(kind) > operand.width:
            raise NotImplementedError(f"{operand} as {kind}")
        if size_of(kind) == operand.width:
            return f"{operand.name}.view({kind})"
        low = f"{operand.name}.view({CANONICAL[operand.width]}).astype(u{size_of(kind)})"
        return f"{low}.view({kind})"

    def array(self, operand: Operand | None, kind: str) -> str:
        """Expression of an operand as an array even where it is a constant."""
        text = self.read(operand, kind)
        return text if isinstance(operand, Register | Special) else f"full(n, {text})"

    def shared_offset(self, symbol: Symbol) -> int:
        if symbol.name not in self.kernel.function.shared:
            raise NotImplementedError(f"symbol {symbol.name}")
        return self.kernel.function.shared[symbol.name][0]

    def address(self, operand: Operand | None) -> str:
        if not isinstance(operand, Address):
            raise NotImplementedError(f"address {operand}")
        if isinstance(operand.base, Register):
            kind = CANONICAL[operand.base.width]
            text = self.read(operand.base, kind)
            if operand.offset:
                text = f"{text} + {self.integer(operand.offset, kind)}"
            return f"({text}).astype(i8)"
        base = operand.base
        start = base.bits if isinstance(base, Immediate) else self.shared_offset(base)
        return f"full(n, {self.integer(start + operand.offset, 'i8')})"

    def condition(self, instruction: Instruction) -> str:
        """Whether each thread executes the instruction; None: all do."""
        if instruction.predicate is None:
            return "None"
        predicate = self.read(instruction.predicate, "b1")
        return f"~{predicate}" if instruction.negated else predicate

    # --- results

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def write(self, result: Operand | None, kind: str, text: str, of: Instruction) -> None:
        """Assign an expression; threads that do not execute the instruction keep the old value."""
        if result is None:
            self.emit(text)
            return
        if not isinstance(result, Register):
            raise NotImplementedError(f"result {result}")
        if kind != "b1" and size_of(kind) < result.width:  # as a load into a wider register does
            kind, old = f"{'i' if kind[0] == 'i' else 'u'}{result.width}", kind
            text = f"({text}).view({old[0].replace('f', 'u')}{old[1]}).astype({kind})"
        if kind != "b1" and size_of(kind) != result.width:
            raise NotImplementedError(f"{kind} into {result}")
        if of.predicate is not None:
            text = f"where({self.condition(of)}, {text}, {self.read(result, kind)})"
        self.emit(f"{result.name} = {text}")
        self.kinds[result.name] = kind
        self.written[result.name] = None
