"""Who is compared: adapters around each package's public interface, a file for each package.

An adapter is a function under `@offers(operation)` that imports what it needs and returns the
call: a function of the operation's inputs. What cannot run here raises ImportError or Unavailable
while it is made; the reason goes to the results file and the page. The same adapter serves an
operation and its gradient.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.peers.definitions import Results, with_gradients
from bench.peers.operations import OPERATIONS

Call = Callable[[object], Results]
FAMILIES = ("ours", "plain", "trl", "liger", "cce", "fla", "quack", "verl")
OURS = "kl_kernels"


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Tolerance:
    """Errors against float64 up to which a contender is timed.

    value: absolute, and relative to the true value; gradient: relative to its norm. Both get the
    rounding of a result's own dtype on top.
    """

    value: float
    gradient: float


FUSED = Tolerance(4e-6, 1e-5)  # promised by kl_kernels
FLOAT32 = Tolerance(2e-4, 1e-3)  # float32 sums over a vocabulary, in any order


@dataclass(frozen=True)
class Contender:
    name: str
    family: str
    operation: str
    make: Callable[[], Call]
    tolerance: Tolerance
    rounds: bool  # computes in the logits' dtype, not in float32
    source: str  # the input that the gradient is taken in, where it is not the operation's
    constant: tuple[str, ...]  # results that carry no gradient, though the operation's do
    note: str

    def ready(self) -> Call:
        """The call; ImportError or Unavailable if it cannot run here.

        It takes gradients in those of the operation's sources that require one.
        """
        call = self.make()
        sources = OPERATIONS[self.operation].sources
        names = (self.source,) if sources and self.source else sources

        def run(x: object) -> Results:
            tensors = [getattr(x, name) for name in names]
            with torch.set_grad_enabled(any(t.requires_grad for t in tensors)):
                return with_gradients(call(x), *tensors)

        return run


REGISTRY: list[Contender] = []


def offers(
    *operations: str,
    name: str,
    tolerance: Tolerance = FLOAT32,
    rounds: bool = False,
    source: str = "",
    constant: tuple[str, ...] = (),
    note: str = "",
) -> Callable[[Callable[[], Call]], Callable[[], Call]]:
    """Register a maker for these operations and for those that differentiate them."""

    def register(make: Callable[[], Call]) -> Callable[[], Call]:
        family = make.__module__.rpartition(".")[2]
        for operation in OPERATIONS.values():
            if operation.name in operations or operation.of in operations:
                REGISTRY.append(
                    Contender(
                        name,
                        family,
                        operation.name,
                        make,
                        tolerance,
                        rounds,
                        source,
                        constant,
                        note,
                    )
                )
        return make

    return register


def contenders(operation: str) -> list[Contender]:
    """Ours first."""
    return [c for c in REGISTRY if c.operation == operation]


def need_cuda(package: str) -> None:
    if not torch.cuda.is_available():
        raise Unavailable(f"{package}'s kernels need a GPU")


for family in FAMILIES:
    importlib.import_module(f"{__name__}.{family}")
