"""State that a forked child inherits and must not use: its parent's locks and files.

`multiprocessing` with "fork" and the workers of a `DataLoader` are such children.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field


def held_across_forks() -> AbstractContextManager[bool]:
    """Return a lock that a fork waits for, so that no child inherits it held by another thread."""
    lock = threading.RLock()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )
    return lock


@dataclass(frozen=True)
class Owner:
    """The process that made something: its children have a copy that they must not use."""

    pid: int = field(default_factory=os.getpid)

    @property
    def is_here(self) -> bool:
        return os.getpid() == self.pid

    def check(self, what: str) -> None:
        """Refuse any other process.

        Raises:
            ValueError: this is another process; `what` names the thing in the message.
        """
        if not self.is_here:
            raise ValueError(
                f"{what} belongs to process {self.pid}, and this is process {os.getpid()}, forked "
                "from it; write to it in its own process alone"
            )
