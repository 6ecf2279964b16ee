"""Changes of a kernel's PTX, one instruction at a time, that make it wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from .parse import SIZES, Address, Function, Immediate, Instruction, Operand, Vector

BARRIERS = ("bar.sync", "barrier.sync", "bar.warp.sync", "barrier.cluster.")
COPY_WAITS = ("cp.async.wait_group", "cp.async.wait_all")
EXPONENTIALS = ("ex2.", "lg2.")
# Comparisons of integers, each beside the one that differs at the bound alone.
OFF_BY_ONE = {
    "lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "lo": "ls", "ls": "lo", "hi": "hs", "hs": "hi",
}  # fmt: skip
ARITHMETIC = ("add", "sub", "mul", "mad", "fma", "shl", "shr", "min", "max", "and", "or", "selp")
EXPONENT = {"f32": 0x7F800000, "f64": 0x7FF << 52}
TOP_OF_MANTISSA = {"f32": 1 << 22, "f64": 1 << 51}
ONE = {"f32": 0x3F800000, "f64": 0x3FF << 52}
ANOTHER_VALUE = {1: 1, 2: 0x3FA0, 4: 0x3FA00000, 8: 0x3FF4 << 48}  # 1.25 as bfloat16, float, double


class Mutation(NamedTuple):
    """One change of a function.

    Attributes:
        kind: a sentence about it, the same for all of its kind.
        index: of the instruction in the function's body.
        by: what stands there instead.
    """

    kind: str
    index: int
    by: tuple[Instruction, ...]


def mutations(function: Function) -> Iterator[Mutation]:
    """Every change of every instruction, in the order of the text."""
    for index, item in enumerate(function.body):
        if not isinstance(item, str):
            for kind, by in changes(item):
                yield Mutation(kind, index, by)


def applied(function: Function, mutation: Mutation) -> Function:
    """The function with one change; all other instructions are shared."""
    body = [*function.body]
    body[mutation.index : mutation.index + 1] = mutation.by
    return dataclasses.replace(function, body=body)


def changes(instruction: Instruction) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
    """Possible successors of an instruction, by the kind of change."""
    op, args = instruction.op, instruction.args
    if op.startswith(BARRIERS):
        yield "barrier removed", ()
    if op.startswith(COPY_WAITS):
        yield "wait for a copy removed", ()
    if op.startswith("shfl.sync") and isinstance(args[2], Immediate):
        lane = Immediate(other_lane(args[2].bits), "int")
        yield "shuffle from another lane", (with_argument(instruction, 2, lane),)
    if instruction.predicate is not None:
        inverted = dataclasses.replace(instruction, negated=not instruction.negated)
        yield "predicate inverted", (inverted,)
        yield "predicate dropped", (dataclasses.replace(instruction, predicate=None),)
    if op.startswith(EXPONENTIALS) and op.endswith("f32"):
        yield "ex2 or lg2 skipped", (dataclasses.replace(instruction, op="mov.b32"),)
    if instruction.family == "st":
        yield from changes_of_store(instruction)
    if instruction.family == "add":
        subtracted = dataclasses.replace(instruction, op=op.replace("add", "sub", 1))
        yield "add turned to sub", (subtracted,)
    if instruction.family in ARITHMETIC:
        for place, argument in enumerate(args[1:], 1):
            if isinstance(argument, Immediate):
                changed = with_argument(instruction, place, other_constant(argument))
                yield "constant changed", (changed,)
    if instruction.family == "setp" and instruction.modifiers[-1][0] in "sub":
        compare = instruction.modifiers[0]
        if compare in OFF_BY_ONE:
            changed_op = op.replace(compare, OFF_BY_ONE[compare], 1)
            yield "bound off by one", (dataclasses.replace(instruction, op=changed_op),)


def changes_of_store(store: Instruction) -> Iterator[tuple[str, tuple[Instruction, ...]]]:
    address, value = store.args[:2]  # a cache policy may follow
    assert isinstance(address, Address)
    yield "store deleted", ()
    size = SIZES[store.modifiers[-1]]
    n_bytes = size * (len(value.parts) if isinstance(value, Vector) else 1)
    beside = dataclasses.replace(address, offset=address.offset + n_bytes)
    yield "store repeated at the next address", (store, with_argument(store, 0, beside))
    kind = store.modifiers[-1] if store.modifiers[-1] in ONE else "int"
    other: Operand = Immediate(ANOTHER_VALUE[size], kind)
    if isinstance(value, Vector):
        other = Vector((other,) * len(value.parts))
    yield "store repeated with another value", (store, with_argument(store, 1, other))


def with_argument(instruction: Instruction, place: int, argument: Operand) -> Instruction:
    args = [*instruction.args]
    args[place] = argument
    return dataclasses.replace(instruction, args=args)


def other_lane(lane: int) -> int:
    """A lane whose butterfly would take some values twice and others never.

    >>> [other_lane(lane) for lane in (0, 1, 8, 16)]
    [1, 2, 16, 8]
    """
    return 8 if lane == 16 else 2 * lane or 1


def other_constant(constant: Immediate) -> Immediate:
    """An integer plus one; of a float another mantissa, 1 for 0, and 0 for infinity."""
    bits, kind = constant.bits, constant.kind
    if kind == "int":
        return Immediate(bits + 1, kind)
    exponent = bits & EXPONENT[kind]
    if exponent == EXPONENT[kind]:
        return Immediate(0, kind)
    return Immediate(bits ^ TOP_OF_MANTISSA[kind] if exponent else ONE[kind], kind)
