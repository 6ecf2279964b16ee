"""The records of an audit log: how a line is written, read and linked to the one before.

A line is a JSON object in canonical form (keys sorted, no spaces, ASCII, no NaN) that ends with its
own hash: SHA-256 of the line's bytes without the part `,"hash":"..."`. One of the hashed keys,
"previous", is the hash of the line before. So the hash of the last line fixes every byte above it.

Beside the log lies its head: how many records there are, and the hash of the last one. It is what
tells a log whose end was cut off from one that ended there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kl_kernels.checks import unboxed
from kl_kernels.files import write_text

FORMAT = 1  # in the header record; to be raised when old readers would misjudge a log
FIRST_PREVIOUS = "0" * 64
# A file without line ends must not be read whole before it is refused.
MAX_LINE_BYTES = 16 * 2**20

_HASH = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n')
_HASH_BYTES = len(',"hash":""}\n') + 64
_FIELDS = {"data", "index", "kind", "previous", "time"}


@dataclass(frozen=True)
class Record:
    """One line of a log."""

    index: int  # 0 for the first line
    kind: str
    time: str  # UTC, ISO 8601: what the writer's clock said
    data: dict[str, Any]
    previous: str  # hash of the record before, FIRST_PREVIOUS before the first
    hash: str


@dataclass(frozen=True)
class Head:
    """The end of a log: the number of its records, and the hash of the last one."""

    count: int = 0
    hash: str = FIRST_PREVIOUS

    def write(self, log: Path) -> None:
        write_text(head_path(log), json.dumps(asdict(self)) + "\n")

    @staticmethod
    def read(log: Path) -> Head:
        """Read the head beside `log`.

        Raises:
            FileNotFoundError: there is none.
            ValueError: the file is not a head.
        """
        path = head_path(log)
        try:
            fields = json.loads(path.read_bytes())
            head = Head(**fields)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"'{path}' is not the head of a log: {error}") from error
        if type(head.count) is not int or head.count < 0 or not is_hash(head.hash):
            raise ValueError(f"'{path}' is not the head of a log: {fields}")
        return head


def head_path(log: Path) -> Path:
    return log.with_name(log.name + ".head")


def is_hash(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def encode(head: Head, kind: str, time: str, data: Mapping[str, Any]) -> tuple[bytes, Head]:
    """The line that continues a log ending at `head`, and the head behind it.

    Raises:
        TypeError: `data` holds something JSON has no place for; the message says where.
        ValueError: the line would be longer than MAX_LINE_BYTES.
    """
    record = {
        "data": plain(data, "data"),
        "index": head.count,
        "kind": kind,
        "previous": head.hash,
        "time": time,
    }
    body = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(body).hexdigest()
    line = body[:-1] + f',"hash":"{digest}"}}\n'.encode()
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"data takes {len(line)} bytes as JSON; accepted: up to {MAX_LINE_BYTES}")
    return line, Head(head.count + 1, digest)


def decode(line: bytes) -> Record | None:
    """The record on a line, or None where the line is not one or is not what was hashed."""
    match = _HASH.fullmatch(line, max(0, len(line) - _HASH_BYTES))
    if match is None:
        return None
    body = line[: match.start()] + b"}"
    digest = match[1].decode()
    if hashlib.sha256(body).hexdigest() != digest:
        return None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(fields, dict) or set(fields) != _FIELDS:
        return None
    record = Record(**fields, hash=digest)
    types = {"index": int, "kind": str, "time": str, "data": dict, "previous": str}
    return record if all(type(fields[k]) is t for k, t in types.items()) else None


def plain(value: Any, where: str) -> Any:
    """`value` as strict JSON can hold it: NaN and infinities become strings, tuples lists.

    The strings are "NaN", "Infinity" and "-Infinity", which `float` reads back, in Python and in
    JavaScript alike. Numbers of numpy's and 0-dim tensors become Python's.
    """
    value = unboxed(where, value.detach() if isinstance(value, Tensor) else value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys must be str")
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{where} is a {type(value).__name__}; accepted: None, bool, int, float, str, "
        "and lists and dicts of them"
    )
