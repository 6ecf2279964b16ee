"""Calls of a backend's operators, remembered, and made again with a kernel that was changed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import small_cases
import torch
from torch import Tensor

from kl_kernels.backends import dispatch

from . import machine
from .blocks import Block, Kernel
from .counters import Counters
from .launches import Launches, tensors_in
from .parse import Function

STEPS = 2_500  # blocks, more than any call takes
SURVIVED, SAME_BITS = "survived", "survived, the same bits"
WRITTEN = ("grad_logits", "gradient")


class Mutant(Kernel):
    """A kernel with a change, which takes the blocks that are not concerned from the original.

    Args:
        function: the original's, of which it shares all other instructions.
        original: the kernel without the change.
    """

    def __init__(self, function: Function, original: Kernel) -> None:
        super().__init__(function)
        self.original = original
        known = {self._signature(original, block): block.index for block in original.blocks}
        self.same = {
            block.index: known[signature]
            for block in self.blocks
            if (signature := self._signature(self, block)) in known
        }

    @staticmethod
    def _signature(kernel: Kernel, block: Block) -> tuple[Any, ...]:
        instructions = tuple(map(id, block.instructions))
        return instructions, id(block.end), frozenset(kernel.live_out[block.index])

    def run(self, index: int, full: bool) -> Any:
        if index in self.same:
            return self.original.run(self.same[index], full)
        return super().run(index, full)


@dataclass
class Call:
    """A call of an operator, which was right.

    Attributes:
        case: the size and dtype of the small case it is a part of.
        operator: its name.
        arguments: as they were before the call.
        found: results, and what the call has written.
        expected: the same of the reference; None where a backend has its own representation.
        executed: places in the body of each kernel, by the kernel's key.
    """

    case: tuple[int, torch.dtype]
    operator: str
    arguments: Any
    found: list[Tensor] = field(default_factory=list)
    expected: list[Tensor | None] = field(default_factory=list)
    executed: dict[str, set[int]] = field(default_factory=dict)


class Replay:
    """The operators of one backend on the machine.

    Args:
        backend: its name.
        launches: what runs its kernels, entered.
    """

    def __init__(self, backend: str, launches: Launches) -> None:
        self.backend, self.launches = backend, launches
        self.operators = launches.operators(launches.kernels())
        self.reference = dispatch.BACKENDS["reference"].kernels()
        self.calls: list[Call] = []
        self.case: tuple[int, torch.dtype] | None = None  # whose calls are remembered now
        # The same for every case, since the package remembers which it has chosen.
        self.chosen = SimpleNamespace(
            **{name: functools.partial(self._run, name) for name in vars(self.operators)}
        )

    def record(self, cases: list[tuple[int, torch.dtype]]) -> None:
        """Run small cases without a change, and remember every call."""
        for self.case in cases:
            with self._dispatched():
                small_cases.run(self.backend, "cpu", *self.case)
        self.case = None

    def verdict(self, key: str, kernel: Kernel, reached_by: list[Call]) -> str:
        """The way a changed kernel is found: by "value", a kind of fault, an error, or not."""
        survived = SAME_BITS
        with (
            patch.dict(self.launches.lowered, {key: kernel}),
            patch.object(machine, "STEPS", STEPS),
        ):
            cases = set()
            for call in reached_by:
                how = self._again(call)
                if how == SURVIVED:
                    survived = SURVIVED
                    cases.add(call.case)
                elif how != SAME_BITS:
                    return how
            for case in cases:  # a state, which is not compared alone, is so in its use
                if how := self._whole(case):
                    return how
        return survived

    # ---

    def _run(self, name: str, arguments: Any) -> Any:
        operator = getattr(self.operators, name)
        return operator(arguments) if self.case is None else self._recorded(name, arguments)

    def _recorded(self, name: str, arguments: Any) -> Any:
        assert self.case is not None
        call = Call(self.case, name, copied(arguments))
        with spied(self.launches, call.executed), patch.object(machine, "STEPS", STEPS):
            results = getattr(self.operators, name)(arguments)
        faults = self.launches.take_faults()
        assert not faults, faults
        # The tensors themselves belong to the caller, who may change them.
        call.found = [tensor.clone() for tensor in outputs(results, arguments)]
        true_arguments = copied(call.arguments)
        true = outputs(getattr(self.reference, name)(true_arguments), true_arguments)
        call.expected = [
            value if small_cases.close(found, value) else None
            for found, value in zip(call.found, true)
        ]
        self.calls.append(call)
        return results

    def _again(self, call: Call) -> str:
        arguments = copied(call.arguments)
        try:
            results = getattr(self.operators, call.operator)(arguments)
        except Exception as error:
            self.launches.take_faults()
            return f"error: {type(error).__name__}"
        if faults := self.launches.take_faults():
            return faults[0].kind
        found = outputs(results, arguments)
        pairs = zip(found, call.expected)
        if not all(value is None or small_cases.close(mine, value) for mine, value in pairs):
            return "value"
        same = all(map(equal, found, call.found))
        return SAME_BITS if same else SURVIVED

    def _whole(self, case: tuple[int, torch.dtype]) -> str | None:
        with self._dispatched():
            try:
                small_cases.run(self.backend, "cpu", *case)
            except Exception as error:
                self.launches.take_faults()
                is_value = type(error) is RuntimeError
                return "value" if is_value else f"error: {type(error).__name__}"
        faults = self.launches.take_faults()
        return faults[0].kind if faults else None

    @contextmanager
    def _dispatched(self) -> Iterator[None]:
        plain = dispatch.BACKENDS[self.backend]
        on_machine = dataclasses.replace(
            plain,
            kernels=lambda: self.chosen,
            unavailable_reason=lambda: None,
            device_types=("cuda", "cpu"),
        )
        with patch.dict(dispatch.BACKENDS, {self.backend: on_machine}):
            yield


@contextmanager
def spied(launches: Launches, executed: dict[str, set[int]]) -> Iterator[None]:
    """Tell of every launch which instructions were executed."""
    plain = machine.Machine.launch

    def launch(self: machine.Machine, kernel: Kernel, **configuration: Any) -> None:
        self.counting, self.counters = True, Counters()
        plain(self, kernel, **configuration)
        (key,) = (key for key, known in launches.lowered.items() if known is kernel)
        executed.setdefault(key, set()).update(places_of(kernel, self.counters))

    with patch.object(machine.Machine, "launch", launch):
        yield


def places_of(kernel: Kernel, counters: Counters) -> Iterator[int]:
    """Places in the body that were executed; a store under a predicate, if any thread stored."""
    at = {id(item): index for index, item in enumerate(kernel.function.body)}
    traffic = counters.traffic.items()
    stored = {line for (_, what, _, line), found in traffic if what == "store" and found.requests}
    for _, index in counters.blocks:
        block = kernel.blocks[index]
        for item in [*block.instructions, *([block.end] if block.end else [])]:
            if item.family != "st" or item.predicate is None or item.line in stored:
                yield at[id(item)]


def copied(arguments: Any) -> Any:
    """Arguments in memory of their own, laid out alike; those that shared memory share it still."""
    storages: dict[int, Any] = {}

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        mine = storages.setdefault(storage.data_ptr(), storage.clone())
        # Not torch.empty, which the machine takes for memory of an operator's own.
        tensor = torch.tensor([], dtype=value.dtype)
        return tensor.set_(mine, value.storage_offset(), value.size(), value.stride())

    return type(arguments)(*map(copy, arguments))


def outputs(results: Any, arguments: Any) -> list[Tensor]:
    written = [getattr(arguments, name, None) for name in WRITTEN]
    return tensors_in([*(results if isinstance(results, tuple) else [results]), *written])


def equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit."""
    mine, its = (x.contiguous().reshape(-1).view(torch.uint8) for x in (one, other))
    return torch.equal(mine, its)
