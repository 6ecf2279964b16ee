"""PTX text as functions: lists of instructions and labels.

Anything not understood raises NotImplementedError with its line; nothing is skipped.

Grammar: https://docs.nvidia.com/cuda/parallel-thread-execution/#syntax
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass, field

SIZES = {
    "pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2,
    "b32": 4, "u32": 4, "s32": 4, "f32": 4, "f16x2": 4, "bf16x2": 4,
    "b64": 8, "u64": 8, "s64": 8, "f64": 8, "f32x2": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Register:
    name: str  # a Python identifier, unique within the function
    width: int  # bytes; 1 is a predicate


@dataclass(frozen=True)
class Immediate:
    bits: int
    kind: str  # "int", "f32" or "f64": how `bits` is to be read


@dataclass(frozen=True)
class Special:
    name: str  # %tid.x


@dataclass(frozen=True)
class Symbol:
    name: str  # a parameter, a label, a variable in memory


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | Immediate
    offset: int  # bytes


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand | None, ...]  # None: `_`, a result that nobody wants


@dataclass(frozen=True)
class Pair:
    parts: tuple[Operand | None, ...]  # `d|p`, two results of one instruction


Operand = Register | Immediate | Special | Symbol | Address | Vector | Pair


@dataclass
class Instruction:
    predicate: Register | None
    negated: bool  # runs where the predicate is False
    op: str  # with all modifiers: "fma.rn.ftz.f32"
    args: list[Operand | None]
    line: int  # in the text, from 1
    where: str = ""  # "loss.py:58", the source it was compiled from
    used: int | None = None  # a load: bit i says that byte i is wanted; None: all are

    @property
    def modifiers(self) -> list[str]:
        """Everything after the first dot."""
        return self.op.split(".")[1:]

    @property
    def family(self) -> str:
        """Everything before the first dot."""
        return self.op.split(".")[0]


@dataclass
class Function:
    name: str
    params: dict[str, tuple[int, int, str]] = field(default_factory=dict)  # offset, size, type
    param_bytes: int = 0
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset; size, -1: dynamic
    shared_bytes: int = 0
    threads: int | None = None  # in a CTA, where .reqntid or .maxntid names them
    body: list[Instruction | str] = field(default_factory=list)  # strings are labels
    regs: dict[str, int] = field(default_factory=dict)  # bytes of each register used


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"([\w$]+):(?!:)")
_UNTIL_NEWLINE = re.compile(r"\.(?:version|target|address_size|file|loc)\b")
_SOURCE = re.compile(r"\.(?:file|loc)\b")  # .local is no such thing
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)?\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.\w+)?(?:\s+\.align\s+\d+)?)?"
    r"\s+([\w$]+)(?:\[(\d+)\])?"
)
_BOUND = re.compile(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*")
_HEAD = re.compile(r"\.(?:minnctapersm|maxnreg|reqnctapercluster)\s+[\d, ]+|\.explicitcluster")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')
_LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
_EXTERN = re.compile(r"\.extern \.shared \.align (\d+) \.b8 ([\w$]+)\[\]")
_SHARED = re.compile(r"\.shared \.align (\d+) \.(\w+) ([\w$]+)(?:\[(\d+)\])?")
_DATA = re.compile(r"(?:\.visible |\.extern |\.weak )?\.(?:global|const) ")
_USED = re.compile(r'\.pragma "used_bytes_mask (\w+)"')
_MANY = re.compile(r"([%\w$]+)<(\d+)>")
_PREDICATE = re.compile(r"@(!?)(%?[\w$]+)\s+(.*)")
_OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*")
_INSIDE = re.compile(r"([%\w$]+)\s*(?:([+-])\s*(-?\w+))?")
_FLOAT32 = re.compile(r"0[fF]([0-9a-fA-F]{8})")
_FLOAT64 = re.compile(r"0[dD]([0-9a-fA-F]{16})")
_INTEGER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?")
_DECIMAL = re.compile(r"-?\d+\.\d*")


def parse(text: str) -> dict[str, Function]:
    """Read all kernels of a module.

    Args:
        text: PTX, as a compiler writes it.

    Returns:
        Each function by its name.

    Raises:
        NotImplementedError: a statement is not understood; the message begins with its line.

    >>> function = parse(
    ...     ".visible .entry f(.param .u32 x) { .reg .b32 %r<2>; ld.param.b32 %r1, [x]; ret; }"
    ... )["f"]
    >>> [instruction.op for instruction in function.body]
    ['ld.param.b32', 'ret']
    """
    return _Module(text).functions


def align(offset: int, to: int) -> int:
    """Round up to a multiple.

    >>> align(5, 4)
    8
    """
    return -(-offset // to) * to


class _Module:
    def __init__(self, text: str) -> None:
        self.text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match.group(0)), text)
        self.at, self.line, self.counted = 0, 1, 0
        self.functions: dict[str, Function] = {}
        self.files: dict[str, str] = {}
        self.dynamic: dict[str, int] = {}  # alignment of shared arrays that a launch sizes
        for file in _FILE.finditer(self.text):  # these may stand after the functions
            self.files[file[1]] = (file[3] or file[2]).split("/")[-1]
        self.read()

    def refuse(self, what: str) -> NotImplementedError:
        return NotImplementedError(f"line {self.line}: {what}")

    def skip_space(self) -> bool:
        """Move to the next character that counts; False at the end of the text."""
        self.at = _SPACE.match(self.text, self.at).end()
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.at < len(self.text)

    def statement(self) -> str:
        """Take the text up to the next semicolon."""
        end = self.text.find(";", self.at)
        if end < 0:
            raise self.refuse("no semicolon")
        found = " ".join(self.text[self.at : end].split())
        self.at = end + 1
        return found

    def rest_of_line(self) -> str:
        end = self.text.find("\n", self.at)
        start, self.at = self.at, end if end >= 0 else len(self.text)
        return self.text[start : self.at]

    def read(self) -> None:
        while self.skip_space():
            if _UNTIL_NEWLINE.match(self.text, self.at):
                self.rest_of_line()
            elif match := _ENTRY.match(self.text, self.at):
                function = self.head(match)
                self.at = match.end()
                _Body(self, function).read()
                self.functions[function.name] = function
            elif self.text.startswith(".section", self.at):  # debug information
                self.at = self.text.index("}", self.at) + 1
            elif re.match(r"(?:\.\w+\s+)*\.func\b", self.text[self.at : self.at + 80]):
                raise self.refuse("a .func")
            else:
                statement = self.statement()
                if match := _EXTERN.fullmatch(statement):
                    self.dynamic[match[2]] = int(match[1])
                elif not _DATA.match(statement):  # whoever names these data is refused
                    raise self.refuse(statement)

    def head(self, match: re.Match) -> Function:
        function = Function(match[1])
        for declaration in match[2].split(","):
            if not declaration.strip():
                continue
            found = _PARAMETER.fullmatch(declaration.strip())
            if not found or found[2] not in SIZES:
                raise self.refuse(f"parameter {declaration.strip()}")
            size = SIZES[found[2]] * int(found[4] or 1)
            offset = align(function.param_bytes, int(found[1] or SIZES[found[2]]))
            function.params[found[3]] = (offset, size, found[2])
            function.param_bytes = offset + size
        rest = match[3]
        if bound := _BOUND.search(rest):
            function.threads = int(bound[1])
        if rest := _HEAD.sub("", _BOUND.sub("", rest)).strip():
            raise self.refuse(f"directive {rest}")
        return function


class _Body:
    """The part of a function between its braces."""

    def __init__(self, module: _Module, function: Function) -> None:
        self.module, self.function = module, function
        self.scopes: list[dict[str, Register]] = []
        self.labels: set[str] = set()
        self.declared = 0
        self.where = ""
        self.used: int | None = None  # by the next instruction

    def read(self) -> None:
        module, text = self.module, self.module.text
        while module.skip_space():
            symbol = text[module.at]
            if symbol in "{};":
                module.at += 1
                if symbol == "{":
                    self.scopes.append({})
                elif symbol == "}":
                    self.scopes.pop()
                if not self.scopes:
                    break
            elif _SOURCE.match(text, module.at):
                found = _LOCATION.match(module.rest_of_line())
                if found and found[2] != "0":
                    self.where = f"{module.files.get(found[1], found[1])}:{found[2]}"
            elif label := _LABEL.match(text, module.at):
                if label[1] in self.labels:
                    raise module.refuse(f"label {label[1]}, twice")
                self.labels.add(label[1])
                self.function.body.append(label[1])
                module.at = label.end()
            else:
                self.take(module.statement())
        if self.scopes:
            raise module.refuse(f"the end of {self.function.name} is missing")
        for name, alignment in module.dynamic.items():
            self.function.shared_bytes = align(self.function.shared_bytes, max(alignment, 16))
            self.function.shared[name] = (self.function.shared_bytes, -1)

    def take(self, statement: str) -> None:
        if statement.startswith(".reg "):
            self.declare(statement)
        elif statement.startswith(".shared "):
            match = _SHARED.fullmatch(statement)
            if not match or match[2] not in SIZES:
                raise self.module.refuse(statement)
            offset = align(self.function.shared_bytes, int(match[1]))
            size = SIZES[match[2]] * int(match[4] or 1)
            self.function.shared[match[3]] = (offset, size)
            self.function.shared_bytes = offset + size
        elif used := _USED.fullmatch(statement):
            self.used = int(used[1], 0)
        elif statement.startswith(".pragma "):
            pass  # advice about unrolling
        elif statement.startswith("."):
            raise self.module.refuse(statement)
        else:
            self.function.body.append(self.instruction(statement))

    def declare(self, statement: str) -> None:
        _, kind, names = statement.split(" ", 2)
        width = SIZES.get(kind[1:], 1)
        if width == 1 and kind != ".pred":
            raise self.module.refuse(statement)
        self.declared += 1
        inner = f"_{self.declared}" if len(self.scopes) > 1 else ""  # the same name in two scopes
        for name in map(str.strip, names.split(",")):
            match = _MANY.fullmatch(name)
            stem = match[1] if match else name
            for number in range(int(match[2])) if match else [""]:
                plain = stem.replace("%", "").replace("$", "_")
                register = Register(f"_{plain}{number}{inner}", width)
                self.scopes[-1][f"{stem}{number}"] = register

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            if name in scope:
                self.function.regs[scope[name].name] = scope[name].width
                return scope[name]
        return None

    def instruction(self, statement: str) -> Instruction:
        predicate, negated = None, False
        if match := _PREDICATE.match(statement):
            predicate, negated, statement = self.register(match[2]), bool(match[1]), match[3]
            if predicate is None or predicate.width != 1:
                raise self.module.refuse(f"predicate {match[2]}")
        op, _, rest = statement.partition(" ")
        args = [self.operand(text.strip()) for text in _OPERANDS.findall(rest)]
        used, self.used = self.used, None
        return Instruction(predicate, negated, op, args, self.module.line, self.where, used)

    def parts(self, texts: list[str]) -> tuple[Operand | None, ...]:
        return tuple(self.operand(text.strip()) for text in texts)

    def operand(self, text: str) -> Operand | None:
        if register := self.register(text):
            return register
        if text == "_":
            return None
        if text.startswith("{") and text.endswith("}"):
            return Vector(self.parts(text[1:-1].split(",")))
        if "|" in text:
            return Pair(self.parts(text.split("|")))
        if text.startswith("[") and text.endswith("]"):
            return self.address(text)
        if match := _FLOAT32.fullmatch(text):
            return Immediate(int(match[1], 16), "f32")
        if match := _FLOAT64.fullmatch(text):
            return Immediate(int(match[1], 16), "f64")
        if match := _INTEGER.fullmatch(text):
            return Immediate(int(match[2], 0) * (-1 if match[1] else 1), "int")
        if _DECIMAL.fullmatch(text):
            return Immediate(*struct.unpack("<I", struct.pack("<f", float(text))), "f32")
        if re.fullmatch(r"%[\w.]+", text):
            return Special(text)
        if re.fullmatch(r"[\w$]+", text) and not text[0].isdigit():
            return Symbol(text)
        raise self.module.refuse(f"operand {text}")

    def address(self, text: str) -> Address:
        match = _INSIDE.fullmatch(text[1:-1].strip())
        if not match:
            raise self.module.refuse(f"address {text}")
        offset = int(match[3], 0) if match[3] else 0
        base = self.operand(match[1])
        if not isinstance(base, Register | Symbol | Immediate):
            raise self.module.refuse(f"address {text}")
        return Address(base, -offset if match[2] == "-" else offset)
