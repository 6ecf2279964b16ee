"""Events that detectors raise, and the interface of sinks that receive them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Event:
    """Something a detector found at a step of training."""

    step: int
    kind: str  # the detector's name, such as "kl_jump"
    value: float  # measured by the detector
    limit: float  # the bound that the value is beyond
    message: str  # one sentence: what was seen, in which unit, and what it may mean

    def __str__(self) -> str:
        return f"step {self.step}: {self.message}"


class Sink(Protocol):
    """A receiver of metrics and events besides the caller."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def alert(self, event: Event) -> None: ...

    def close(self) -> None: ...
