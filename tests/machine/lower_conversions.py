"""Moves and conversions: the same number in another register or another type."""

from __future__ import annotations

from .lower_arithmetic import HALVES, family, flushes, kind_of, only, rounded
from .lower_values import TYPES, Values, size_of
from .parse import Immediate, Instruction, Operand, Register, Symbol, Vector


@family("mov")
def move(v: Values, of: Instruction) -> None:
    only(of)
    result, operand = of.args
    kind = kind_of(of)
    if isinstance(result, Vector):
        return unpack(v, of, result, operand, f"u{size_of(kind)}")
    if isinstance(operand, Vector):
        return v.write(result, f"u{size_of(kind)}", packed(v, operand, size_of(kind)), of)
    if isinstance(operand, Immediate | Symbol):
        return v.write(result, kind, f"full(n, {v.read(operand, kind)})", of)
    if isinstance(operand, Register) and v.kinds.get(operand.name, "b1") != "b1":
        kind = v.kinds[operand.name]  # as it is, without a view
    v.write(result, kind, v.read(operand, kind), of)


def unpack(v: Values, of: Instruction, results: Vector, operand: Operand, wide: str) -> None:
    width = size_of(wide) // len(results.parts)
    v.emit(f"t = {v.array(operand, wide)}")
    for place, part in enumerate(results.parts):
        if part is not None:
            text = f"(t >> {wide}({8 * width * place})).astype(u{width})"
            v.write(part, f"u{width}", text, of)


def packed(v: Values, parts: Vector, size: int) -> str:
    width = size // len(parts.parts)
    terms = [
        f"({v.array(part, f'u{width}')}.astype(u{size}) << u{size}({8 * width * place}))"
        for place, part in enumerate(parts.parts)
    ]
    return " | ".join(terms)


ROUNDINGS = {"rni": "rint", "rmi": "floor", "rpi": "ceil", "rzi": "trunc"}


@family("cvt")
def convert(v: Values, of: Instruction) -> None:
    only(of, "rn", "rz", "ftz", "sat", *ROUNDINGS)
    to, source = of.modifiers[-2:]
    rounding = [m for m in of.modifiers[:-2] if m not in ("ftz", "sat")]
    if to in ("bf16x2", "f16x2"):
        if of.modifiers[:-2] != ["rn"]:
            raise NotImplementedError(of.op)
        high, low = (f"I.to_{to[:-2]}({v.array(a, 'f4')})" for a in of.args[1:])
        return v.write(of.args[0], "u4", f"I.joined({low}, {high})", of)
    if source in HALVES or to in HALVES:
        return convert_half(v, of, to, source)
    d, s = TYPES[to], TYPES[source]
    text = v.array(of.args[1], s)
    if s[0] == "f" and d[0] != "f":
        name = ROUNDINGS[rounding[0]]
        text = f"A.ftz({text})" if flushes(of) else text
        return v.write(of.args[0], d, f"I.from_float(np.{name}({text}), {d})", of)
    if s[0] == "f":
        return convert_float(v, of, d, s, rounding)
    if of.modifiers[:-2] != (["rn"] if d[0] == "f" else []):
        raise NotImplementedError(of.op)
    v.write(of.args[0], d, f"{text}.astype({d})", of)


def convert_half(v: Values, of: Instruction, to: str, source: str) -> None:
    if to == "f32" and not of.modifiers[:-2]:
        v.write(of.args[0], "f4", f"I.from_{source}({v.array(of.args[1], 'u2')})", of)
    elif source == "f32" and of.modifiers[:-2] == ["rn"]:
        v.write(of.args[0], "u2", f"I.to_{to}({v.array(of.args[1], 'f4')})", of)
    else:
        raise NotImplementedError(of.op)


def convert_float(v: Values, of: Instruction, d: str, s: str, rounding: list[str]) -> None:
    text = v.array(of.args[1], s)
    if flushes(of) and s == "f4":
        text = f"A.ftz({text})"
    if rounding and rounding[0] in ROUNDINGS:
        text = f"np.{ROUNDINGS[rounding[0]]}({text})"
    elif s == "f8" and d == "f4" and rounding != ["rn"]:
        raise NotImplementedError(of.op)
    if s != d:
        text = f"{text}.astype({d})"
    v.write(of.args[0], d, rounded(of, d, text), of)
