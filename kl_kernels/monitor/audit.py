"""An append-only log of a training run that reveals later changes."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from kl_kernels.files import opener, private_opener, sync_folder
from kl_kernels.forks import Owner
from kl_kernels.monitor.chain import FORMAT, Head, encode, head_path
from kl_kernels.monitor.events import Event
from kl_kernels.monitor.verify import verify_log
from kl_kernels.versions import versions

OWN_KINDS = ("header", "resumed")


class AuditLog:
    """A hash-chained JSON lines file that survives crashes and reveals changes.

    Each record holds the hash of the one before, and the file beside it, `path + ".head"`, the
    number of records and the last hash. A record is on the disk when `append` returns, which takes
    a few milliseconds. A crash loses the record being written and no other. It is a `Sink`: metrics
    become records of kind "metrics", events of kind "event".

    It proves nothing against somebody who rewrites the log and the sidecar together. For that,
    keep `head` elsewhere now and then.

    Opening a log that exists checks it and goes on behind it, with a record of kind "resumed".

    A log has one writer, the process that opened it. A child that is forked from it (a worker of a
    `DataLoader` or of `multiprocessing`) holds none of its files and no lock, and its `append` is
    refused.

    Args:
        path: the log; ".head" and ".lock" are added for the two files beside it.
        header: facts about the run to record, such as its configuration and `model_hash`es;
            JSON-like, see `append`. The first record holds it along with package versions; where
            the log exists, the "resumed" record does.

    Raises:
        ValueError: the log exists and is broken (the message names the first bad line), or is open
            for writing elsewhere.
        TypeError: `header` holds something JSON has no place for.
        OSError: the folder is missing, or cannot be written.

    Examples:
        >>> import tempfile, kl_kernels
        >>> from kl_kernels.monitor.verify import verify_log
        >>> path = tempfile.mkdtemp() + "/audit.jsonl"
        >>> with kl_kernels.AuditLog(path, header={"seed": 0}) as log:
        ...     log.append("checkpoint", {"step": 100})
        ...     head = log.head
        >>> verify_log(path, head=head).message
        '2 records, each as it was written; line 2 has the given hash'
    """

    def __init__(self, path: str | Path, *, header: Mapping[str, Any] | None = None) -> None:
        self.path = Path(path)
        self._guard = threading.Lock()
        self._head = Head()
        self._owner = Owner()
        self._file: FileIO | None = None
        self._lock: int | None = None
        _open.add(self)
        self._lock = _lock(self.path)
        try:
            facts = {"format": FORMAT, "versions": versions(), "header": header or {}}
            encode(Head(), "header", "", facts)  # refuses a bad header before there is a file
            exists = self.path.exists() or head_path(self.path).exists()
            torn_bytes = self._recover() if exists else self._create()
            is_new = self._head.count == 0
            if is_new:
                self._append("header", facts)
            if torn_bytes or not is_new:
                self._append("resumed", {"torn_bytes": torn_bytes, **facts})
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        records, head = self._head.count, self.head[:12]
        state = "closed" if self._file is None else "open"
        return f"AuditLog({str(self.path)!r}, records={records}, head={head!r}, {state})"

    @property
    def head(self) -> str:
        """Hash of the last record, 64 hexadecimal digits: it fixes every byte of the log so far."""
        return self._head.hash

    def append(self, kind: str, data: Mapping[str, Any]) -> None:
        """Add a record; when this returns, it is on the disk.

        Args:
            kind: what the record is; anything but "header" and "resumed".
            data: None, bool, int, float, str, and lists, tuples and dicts of them. NaN and
                infinities are written as the strings "NaN", "Infinity" and "-Infinity".

        Raises:
            TypeError: `data` holds something else; the message says where.
            ValueError: `kind` is empty or reserved, the record is longer than 16 MiB, the log is
                closed (also by an earlier write that failed), or this is not the process that
                opened it.
            OSError: the disk refused; the log is closed then, and can be opened again.
        """
        if not isinstance(kind, str) or not kind or kind in OWN_KINDS:
            raise ValueError(f"kind is {kind!r}; accepted: any name but {', '.join(OWN_KINDS)}")
        self._append(kind, data)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a record of kind "metrics"; errors are those of `append`."""
        self.append("metrics", {"step": step, "metrics": metrics})

    def alert(self, event: Event) -> None:
        """Add a record of kind "event"; errors are those of `append`."""
        self.append("event", asdict(event))

    def close(self) -> None:
        """Let others write. A second call has no effect, nor has a call in a forked child."""
        if self._lock is not None and self._owner.is_here:
            # A child that was forked unknown to Python shares the lock, and would keep it.
            _unlock(self._lock)
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> AuditLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _create(self) -> int:
        # The sidecar comes first: a log without one was tampered with, never caught in the making.
        self._head.write(self.path)
        self._file = FileIO(self.path, "x", opener=opener)
        sync_folder(self.path.parent)
        return 0

    def _recover(self) -> int:
        """Continue the log without the bytes of an unfinished record, and return their number."""
        if not self.path.exists():
            self._head = Head.read(self.path)
            if self._head.count > 0:
                raise ValueError(
                    f"'{self.path}' is missing, but its sidecar counts {self._head.count} records"
                )
            return self._create()
        verdict = verify_log(self.path)
        if not verdict.ok and verdict.problem != "torn tail":
            raise ValueError(
                f"'{self.path}' cannot be continued ({verdict.problem}): {verdict.message}"
            )
        self._head = Head(verdict.records, verdict.head)
        self._file = FileIO(self.path, "a", opener=opener)
        torn_bytes = self.path.stat().st_size - verdict.whole_bytes
        self._file.truncate(verdict.whole_bytes)
        os.fsync(self._file.fileno())
        self._head.write(self.path)  # may have been one record behind
        return torn_bytes

    def _append(self, kind: str, data: Mapping[str, Any]) -> None:
        self._owner.check(f"'{self.path}'")
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        with self._guard:
            if self._file is None:
                raise ValueError(f"'{self.path}' is closed; open it again with AuditLog")
            line, head = encode(self._head, kind, time, data)
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
                # Written after the record: a sidecar ahead of its log would look like a cut log.
                head.write(self.path)
            except BaseException:
                # The state of the disk is unknown now; opening the log again checks it.
                self.close()
                raise
            self._head = head


_open: weakref.WeakSet[AuditLog] = weakref.WeakSet()  # open logs, and closed ones


def _leave_to_parent() -> None:
    """Close a forked child's descriptors, which would keep the locks of a parent that dies."""
    for log in _open:
        log._close_descriptors()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


def _lock(path: Path) -> int:
    """Hold the file beside `path` that one writer at a time can hold, until it is closed or dies.

    The file stays: were it removed, two writers could each lock one of the same name.
    """
    descriptor = private_opener(f"{path}.lock", os.O_RDWR | os.O_CREAT)
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if not isinstance(error, (BlockingIOError, PermissionError)):
            raise  # the file system has no locks
        raise ValueError(
            f"'{path}' is open for writing, here or in another process; a log has one writer"
        ) from error
    return descriptor


def _unlock(descriptor: int) -> None:
    if sys.platform != "win32":  # there, children are not forked
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
