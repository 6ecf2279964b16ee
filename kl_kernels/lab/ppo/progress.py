"""A progress bar over updates, whose rate leaves out the time before the first of them."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm


class UpdateProgress(tqdm):
    """A bar that says how long the rest takes once it has seen two updates.

    The first update also waits for all that comes before it: a pretraining, other runs' start,
    memory that is touched for the first time. As an update's time, that would promise hours.
    """

    n: int  # tqdm's

    def __init__(self, **options: Any) -> None:
        self.first: tuple[int, float] | None = None  # updates, and when they were reached
        self.last: tuple[int, float] | None = None
        super().__init__(unit="update", dynamic_ncols=True, **options)

    def reach(self, updates: int, status: str) -> None:
        """Show that so many updates are done, with a line on the last one."""
        if updates > self.n:
            self.n = updates
            self.last = updates, time.monotonic()
            self.first = self.first or self.last
        self.set_postfix_str(status)

    @property
    def format_dict(self) -> dict[str, Any]:
        """Give the fields that tqdm's line is made of."""
        rate = None
        if self.first and self.last and self.last[1] > self.first[1]:
            rate = (self.last[0] - self.first[0]) / (self.last[1] - self.first[1])
        # Without a rate tqdm divides n - initial by the time since the start; 0 of them is "?".
        return super().format_dict | {"rate": rate, "initial": self.n}
