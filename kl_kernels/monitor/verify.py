"""Verification of an audit log: whether it is as it was written, and its first line that is not.

Lines are read one at a time and nothing in them is executed: a log from elsewhere is safe to check.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from kl_kernels.monitor.chain import (
    FORMAT,
    MAX_LINE_BYTES,
    Head,
    Record,
    decode,
    head_path,
    is_hash,
)

PROBLEMS = (
    "edited",
    "removed",
    "reordered",
    "inserted",
    "truncated",
    "torn tail",
    "sidecar missing",
    "sidecar disagrees",
    "hash not found",
    "not a log",
)


@dataclass(frozen=True)
class Verdict:
    """The result of checking a log."""

    message: str  # one sentence
    records: int  # count of those that are as they were written, from the first on
    head: str  # hash of the last of them
    problem: str | None = None  # one of PROBLEMS; None: the log is whole
    line: int | None = None  # the first bad one, counted from 1, where the problem has one
    whole_bytes: int = 0  # size of the file up to the last good record

    @property
    def ok(self) -> bool:
        return self.problem is None


def verify_log(path: str | Path, head: str | None = None) -> Verdict:
    """Check the chain of an audit log and its sidecar, reading line by line.

    A record that was edited together with its own hash is found at the line after it, which still
    names the old one. A log that is being written is checked up to a record on the disk.

    Args:
        path: the log; its sidecar, `path + ".head"`, must lie beside it.
        head: hash of a record, printed or copied when it was written; 64 hexadecimal digits. The
            log must hold it. Then everything up to that record is as it was then, even if the
            sidecar was rewritten along with the log.

    Raises:
        ValueError: `head` is not a hash.
        OSError: the log cannot be read.
    """
    path = Path(path)
    if head is not None and not is_hash(head):
        raise ValueError(f"head is {head!r}; it must be 64 hexadecimal digits, in lower case")
    with open(path, "rb") as file:
        # Read before the lines: a writer may add some meanwhile, but all that it counts are there.
        sidecar = _read_sidecar(path)
        return _judge(path, file, sidecar, head)


@dataclass
class _Walk:
    """The chain up to its first break."""

    end: Head  # behind the last good record
    whole_bytes: int  # size of the file up to that record
    bad: bytes | None  # the line that does not continue it; None: there are no more
    bad_record: Record | None
    at_sidecar: Head | None  # the chain's end after as many records as the sidecar counts
    wanted_line: int | None


def _walk(file: BinaryIO, sidecar: Head | None, wanted: str | None) -> _Walk:
    walk = _Walk(Head(), 0, None, None, None, None)
    for line in lines_of(file):
        if sidecar and walk.end.count == sidecar.count:
            walk.at_sidecar = walk.end
        record = decode(line)
        if record is None or not _continues(record, walk.end):
            walk.bad, walk.bad_record = line, record
            return walk
        walk.end = Head(walk.end.count + 1, record.hash)
        walk.whole_bytes += len(line)
        if record.hash == wanted:
            walk.wanted_line = walk.end.count
    if sidecar and walk.end.count == sidecar.count:
        walk.at_sidecar = walk.end
    return walk


def _judge(path: Path, file: BinaryIO, sidecar: Head | str, wanted: str | None) -> Verdict:
    head = sidecar if isinstance(sidecar, Head) else None
    walk = _walk(file, head, wanted)
    count, next_line = walk.end.count, walk.end.count + 1

    def verdict(message: str, problem: str | None = None, line: int | None = None) -> Verdict:
        return Verdict(message, count, walk.end.hash, problem, line, walk.whole_bytes)

    is_torn = False
    if walk.bad is not None:
        # Bytes beyond the sidecar's count were never finished: a crash, not an edit.
        uncounted = head is not None and head.count == count and walk.bad_record is None
        is_torn = not file.read(1) and (uncounted or not walk.bad.endswith(b"\n"))
        if not is_torn and count == 0 and not _is_of_a_log(walk, head):
            return verdict(
                f"line 1 is no header of an audit log of format {FORMAT}", "not a log", 1
            )
        if not is_torn:
            file.seek(walk.whole_bytes + len(walk.bad))
            problem, message = _explain(file, walk.end, walk.bad_record)
            return verdict(f"line {next_line} {message}", problem, next_line)

    if isinstance(sidecar, str):
        problem = "sidecar disagrees" if sidecar else "sidecar missing"
        missing = f"'{head_path(path)}' is missing: the log may have ended later"
        return verdict(sidecar or missing, problem)
    if sidecar.count > count:
        seen = f"line {next_line} is cut short" if is_torn else f"the log ends at line {count}"
        message = f"{seen}, but {sidecar.count} records were written"
        return verdict(message, "truncated", next_line)
    if walk.at_sidecar != sidecar:
        message = f"line {sidecar.count} is not the record the sidecar names; one was replaced"
        return verdict(message, "sidecar disagrees", max(1, sidecar.count))

    behind = count + is_torn - sidecar.count
    note = ""
    if _read_sidecar(path) != sidecar:
        note = "; it is being written"
    elif behind > 1:
        message = f"the sidecar is {behind} records behind the log; a crash leaves it 1 behind"
        return verdict(message, "sidecar disagrees", sidecar.count + 1)
    elif is_torn:
        message = (
            f"the writer was stopped inside line {next_line}, of which {len(walk.bad or b'')} "
            "bytes are there; opening the log drops them, and records that"
        )
        return verdict(message, "torn tail", next_line)
    elif behind == 1:
        note = "; the writer was stopped before the sidecar counted the last one"
    if wanted is not None and walk.wanted_line is None:
        return verdict(f"no record has the hash {wanted}", "hash not found")
    found = "" if wanted is None else f"; line {walk.wanted_line} has the given hash"
    return verdict(f"{count} records, each as it was written{found}{note}")


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their ends; one that is longer than any record comes in parts."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        yield line


def _continues(record: Record, end: Head) -> bool:
    is_link = (record.index, record.previous) == (end.count, end.hash)
    return is_link and (record.index > 0 or _is_header(record))


def _is_header(record: Record) -> bool:
    return record.kind == "header" and record.data.get("format") == FORMAT


def _is_of_a_log(walk: _Walk, sidecar: Head | None) -> bool:
    """Whether a bad first line belongs to a log: a damaged one, or one from further down."""
    if walk.bad_record is not None:
        return walk.bad_record.index > 0
    return sidecar is not None or (walk.bad or b"").startswith(b'{"data":')


def _read_sidecar(path: Path) -> Head | str:
    """Read the head beside the log, or say why that failed: "" where there is none."""
    try:
        return Head.read(path)
    except FileNotFoundError:
        return ""
    except ValueError as error:
        return str(error)


def _explain(file: BinaryIO, end: Head, record: Record | None) -> tuple[str, str]:
    """The problem with a line that does not continue a log ending at `end`; `file` is behind it."""
    later = map(decode, lines_of(file))
    follows = any(other is not None and _continues(other, end) for other in later)
    if record is not None and record.index > end.count:
        missing = record.index - end.count
        if follows:
            return "reordered", f"holds record {record.index + 1}, and its own comes later"
        return "removed", f"holds record {record.index + 1}: {missing} before it are gone"
    if record is not None and record.index < end.count:
        return "inserted", f"holds record {record.index + 1} once more, or another in its place"
    if follows:
        return "inserted", "is not of this log, which goes on behind it"
    if record is None:
        return "edited", "is not what was hashed when it was written"
    return "edited", "does not follow the line before it: one of the two was replaced"
