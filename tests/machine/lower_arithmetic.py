"""Instructions that compute: sums, products, approximations, bits, comparisons, choices.

Each function takes the block's `Values` and an instruction, and emits assignments.
"""

from __future__ import annotations

from collections.abc import Callable

from .lower_values import TYPES, WIDER, Values, size_of
from .parse import Immediate, Instruction, Operand, Pair, Register

FAMILIES: dict[str, Callable[[Values, Instruction], None]] = {}
HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def family(*names: str) -> Callable:
    def register(lower: Callable) -> Callable:
        FAMILIES.update(dict.fromkeys(names, lower))
        return lower

    return register


def only(instruction: Instruction, *accepted: str) -> None:
    """Refuse modifiers that nothing here knows the meaning of."""
    unknown = set(instruction.modifiers) - set(accepted) - set(TYPES)
    if unknown:
        raise NotImplementedError(f"modifiers {sorted(unknown)}")


def kind_of(instruction: Instruction) -> str:
    """Type that an instruction computes in; the bits of halves are no integers."""
    name = instruction.modifiers[-1]
    if name in HALVES:
        raise NotImplementedError(instruction.op)
    return TYPES[name]


def flushes(instruction: Instruction) -> bool:
    return "ftz" in instruction.modifiers


def operands(v: Values, of: Instruction, kind: str, which: slice = slice(1, None)) -> list[str]:
    """Read operands, flushed where the instruction flushes."""
    found = []
    for operand in of.args[which]:
        text = v.read(operand, kind)
        if kind == "f4" and flushes(of) and not is_normal(operand):
            text = f"A.ftz({text})"
        found.append(text)
    return found


def is_normal(operand: Operand | None) -> bool:
    """Whether a constant is the same after flushing; nearly all are."""
    if not isinstance(operand, Immediate) or operand.kind != "f32":
        return False
    return operand.bits == 0 or operand.bits & 0x7F800000 != 0


def rounded(of: Instruction, kind: str, text: str) -> str:
    """A float32 result after NaN, flushing and saturation were seen to."""
    if kind == "f4":
        text = f"A.nan({text})"
        if flushes(of):
            text = f"A.ftz({text})"
    if "sat" in of.modifiers:  # NaN becomes 0
        if kind[0] != "f":
            raise NotImplementedError(of.op)
        text = f"np.fmin(np.fmax({text}, {kind}(0)), {kind}(1))"
    return text


def whole(v: Values, of: Instruction, text: str) -> str:
    """An array even where all operands were constants."""
    constant = not any(isinstance(a, Register) for a in of.args[1:])
    return f"full(n, {text})" if constant else text


def binary(v: Values, of: Instruction, template: str) -> None:
    kind = kind_of(of)
    text = template.format(*operands(v, of, kind))
    v.write(of.args[0], kind, whole(v, of, rounded(of, kind, text)), of)


# --- sums and products

SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}


@family("add", "sub", "and", "or", "xor")
def simple(v: Values, of: Instruction) -> None:
    only(of, "rn", "ftz", "sat")
    binary(v, of, f"{{}} {SIGNS[of.family]} {{}}")


@family("mul")
def product(v: Values, of: Instruction) -> None:
    only(of, "rn", "ftz", "sat", "lo", "hi", "wide")
    kind = kind_of(of)
    if "wide" in of.modifiers:
        a, b = (widened(v, operand, kind) for operand in of.args[1:])
        v.write(of.args[0], WIDER[kind], whole(v, of, f"{a} * {b}"), of)
    elif "hi" in of.modifiers:
        if size_of(kind) == 8:
            raise NotImplementedError(of.op)
        a, b = (v.array(operand, kind) for operand in of.args[1:])
        v.write(of.args[0], kind, f"I.high_product({a}, {b})", of)
    else:
        binary(v, of, "{} * {}")


def widened(v: Values, operand: Operand | None, kind: str) -> str:
    text = v.read(operand, kind)
    wide = WIDER[kind]
    return f"{wide}({text})" if isinstance(operand, Immediate) else f"{text}.astype({wide})"


@family("mad")
def multiply_add(v: Values, of: Instruction) -> None:
    only(of, "lo", "wide")
    kind = kind_of(of)
    if "wide" in of.modifiers:
        kind = WIDER[kind]
        a, b = (widened(v, operand, kind_of(of)) for operand in of.args[1:3])
        c = v.read(of.args[3], kind)
    else:
        a, b, c = (v.read(operand, kind) for operand in of.args[1:])
    v.write(of.args[0], kind, whole(v, of, f"{a} * {b} + {c}"), of)


@family("fma")
def fused(v: Values, of: Instruction) -> None:
    only(of, "rn", "rm", "ftz")
    kind = kind_of(of)
    name = {"f4": "fma_down" if "rm" in of.modifiers else "fma", "f8": "fma_double"}[kind]
    if kind == "f8" and "rm" in of.modifiers:
        raise NotImplementedError("rounding down of f64")
    text = f"A.{name}({', '.join(operands(v, of, kind))})"
    v.write(of.args[0], kind, f"A.ftz({text})" if flushes(of) else text, of)


@family("div", "rem")
def divide(v: Values, of: Instruction) -> None:
    only(of, "rn", "full", "approx", "ftz")
    kind = kind_of(of)
    if kind[0] in "iu":
        name = "quotient" if of.family == "div" else "remainder"
        binary(v, of, f"I.{name}({{}}, {{}})")
    elif "rn" in of.modifiers:
        binary(v, of, "{} / {}")
    else:
        a, b = (v.array(operand, kind) for operand in of.args[1:])
        scaled = "full" in of.modifiers
        v.write(of.args[0], kind, f"A.divide({a}, {b}, {flushes(of)}, {scaled})", of)


@family("max", "min")
def extreme(v: Values, of: Instruction) -> None:
    only(of, "NaN", "ftz", "xorsign", "abs")
    function = {"max": "maximum", "min": "minimum"}[of.family]
    name = f"{function}_nan" if "NaN" in of.modifiers else function
    if of.modifiers[-1] == "bf16x2":
        only(of, "NaN")
        a, b = (v.array(operand, "u4") for operand in of.args[1:])
        return v.write(of.args[0], "u4", f"I.packed_extreme({name!r}, {a}, {b})", of)
    kind = kind_of(of)
    if kind[0] in "iu":
        only(of)
        return binary(v, of, f"np.{function}({{}}, {{}})")
    if "abs" in of.modifiers and "xorsign" not in of.modifiers:
        raise NotImplementedError(of.op)
    a, b = (v.array(operand, kind) for operand in of.args[1:])
    if flushes(of):
        a, b = f"A.ftz({a})", f"A.ftz({b})"
    if "xorsign" in of.modifiers:
        sign = f"np.signbit({a}) ^ np.signbit({b})"
        size = f"A.{name}(abs({a}), abs({b}))"
        return v.write(of.args[0], kind, f"where({sign}, -{size}, {size})", of)
    v.write(of.args[0], kind, f"A.{name}({a}, {b})", of)


@family("neg", "abs", "not")
def unary(v: Values, of: Instruction) -> None:
    only(of, "ftz")
    kind = kind_of(of)
    (a,) = operands(v, of, kind)
    sign = {"neg": "-", "abs": "abs", "not": "~"}[of.family]
    v.write(of.args[0], kind, whole(v, of, f"{sign}({a})"), of)


# --- approximations


@family("ex2", "lg2")
def approximate(v: Values, of: Instruction) -> None:
    only(of, "approx", "ftz")
    if of.modifiers[-1] != "f32":
        raise NotImplementedError(of.op)
    a = v.array(of.args[1], "f4")
    v.write(of.args[0], "f4", f"A.{of.family}({a}, {flushes(of)})", of)


@family("rcp")
def reciprocal(v: Values, of: Instruction) -> None:
    only(of, "approx", "ftz", "rn")
    kind = kind_of(of)
    if "approx" not in of.modifiers:
        return binary_of_one(v, of, kind)
    a = v.array(of.args[1], kind)
    text = f"A.rcp({a}, {flushes(of)})" if kind == "f4" else f"A.rcp_double({a})"
    v.write(of.args[0], kind, text, of)


def binary_of_one(v: Values, of: Instruction, kind: str) -> None:
    (a,) = operands(v, of, kind)
    v.write(of.args[0], kind, whole(v, of, rounded(of, kind, f"{kind}(1) / {a}")), of)


@family("copysign")
def copy_sign(v: Values, of: Instruction) -> None:
    """Sign of the first operand, size of the second."""
    only(of)
    kind = kind_of(of)
    sign, size = (v.read(operand, kind) for operand in of.args[1:])
    v.write(of.args[0], kind, whole(v, of, f"np.copysign({size}, {sign})"), of)


# --- bits


@family("bfe")
def bit_field(v: Values, of: Instruction) -> None:
    only(of)
    kind = kind_of(of)
    if kind not in ("u4", "i4"):
        raise NotImplementedError(of.op)
    a, at, length = v.array(of.args[1], kind), *(v.read(x, "u4") for x in of.args[2:])
    v.write(of.args[0], kind, f"I.field({a}, {at}, {length})", of)


@family("prmt")
def permute(v: Values, of: Instruction) -> None:
    only(of)  # the special modes (f4e, b4e, ...) are modifiers
    a, b, selector = (v.array(operand, "u4") for operand in of.args[1:])
    v.write(of.args[0], "u4", f"I.permuted_bytes({a}, {b}, {selector})", of)


@family("shf")
def funnel_shift(v: Values, of: Instruction) -> None:
    only(of, "l", "r", "wrap")
    if "wrap" not in of.modifiers:
        raise NotImplementedError(of.op)
    low, high, by = (v.array(operand, "u4") for operand in of.args[1:])
    v.write(of.args[0], "u4", f"I.funnel({low}, {high}, {by}, {'r' in of.modifiers})", of)


@family("shl", "shr")
def shift(v: Values, of: Instruction) -> None:
    """Shifts beyond the width clear the value, or leave copies of its sign."""
    only(of)
    kind = kind_of(of)
    bits = 8 * size_of(kind)
    a = v.read(of.args[1], kind)
    sign = "<<" if of.family == "shl" else ">>"
    if isinstance(of.args[2], Immediate):
        by = of.args[2].bits & 0xFFFFFFFF
        beyond = by >= bits
        by_text = v.integer(min(by, bits - 1), kind)
    else:
        amount = v.read(of.args[2], "u4")
        by_text = f"np.minimum({amount}, u4({bits - 1})).astype({kind})"
        beyond = f"{amount} >= u4({bits})"
    text = f"{a} {sign} {by_text}"
    # numpy's own shift by the width is undefined.
    if beyond is not False and (sign == "<<" or kind[0] == "u"):
        text = f"where({beyond}, {kind}(0), {text})"
    v.write(of.args[0], kind, whole(v, of, text), of)


# --- comparisons and choices

INTEGER_COMPARISONS = {
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "lo": "<", "ls": "<=", "hi": ">", "hs": ">=",
}  # fmt: skip
FLOAT_COMPARISONS = {
    "eq": "{0} == {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "ne": "({0} < {1}) | ({0} > {1})", "neu": "{0} != {1}",
    "equ": "~(({0} < {1}) | ({0} > {1}))",
    "ltu": "~({0} >= {1})", "leu": "~({0} > {1})", "gtu": "~({0} <= {1})", "geu": "~({0} < {1})",
    "num": "({0} == {0}) & ({1} == {1})", "nan": "({0} != {0}) | ({1} != {1})",
}  # fmt: skip


@family("setp")
def compare(v: Values, of: Instruction) -> None:
    only(of, "ftz", "and", "or", "xor", *INTEGER_COMPARISONS, *FLOAT_COMPARISONS)
    if isinstance(of.args[0], Pair):
        raise NotImplementedError("setp of two predicates")
    kind = kind_of(of)
    x, y = operands(v, of, kind, slice(1, 3))
    name = of.modifiers[0]
    if kind[0] == "f":
        text = FLOAT_COMPARISONS[name].format(x, y)
    else:
        text = f"{x} {INTEGER_COMPARISONS[name]} {y}"
    if len(of.args) == 4:
        sign = {"and": "&", "or": "|", "xor": "^"}[of.modifiers[1]]
        text = f"({text}) {sign} {v.read(of.args[3], 'b1')}"
    v.write(of.args[0], "b1", whole(v, of, text), of)


@family("selp")
def select(v: Values, of: Instruction) -> None:
    only(of)
    kind = kind_of(of)
    a, b, which = v.read(of.args[1], kind), v.read(of.args[2], kind), v.read(of.args[3], "b1")
    v.write(of.args[0], kind, f"where({which}, {a}, {b})", of)
