"""Operators whose launches the machine runs: what they may touch, and what they must have written.

A context, once per process. Inside, memory that torch leaves uninitialised holds POISON, by which
it is known again. The faults of everything that ran are in `faults`.
"""

from __future__ import annotations

import ctypes
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from kl_kernels.schemas import OPERATORS

from .blocks import Kernel
from .faults import Fault
from .lint import asymmetric_butterflies
from .machine import Machine
from .memory import Layout, Memory
from .parse import Function

# NaN in every floating type, no truth value, and no number that anybody writes.
POISON = np.frombuffer(b"\xe5\xff" * 4, np.uint8)
ALLOCATIONS = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]


class Launches:
    """Runs launches, and remembers faults and how much was run.

    Args:
        counting: whether to count instructions and accesses, into `counters`.
    """

    def __init__(self, *, counting: bool = False) -> None:
        self.counting = counting
        self.faults: list[Fault] = []
        self.lowered: dict[str, Kernel] = {}  # by name or by PTX
        self.n_launches = 0
        self.seconds = 0.0
        self.counters: list[Any] = []  # those of every operation, if they are asked for
        self._operation: Operation | None = None
        self._patches = ExitStack()

    def __enter__(self) -> Launches:
        for owner, name in ALLOCATIONS:
            allocate = getattr(owner, name)
            self._patches.enter_context(patch.object(owner, name, self._poisoned(allocate)))
        return self

    def __exit__(self, *raised: Any) -> None:
        self._patches.close()

    def _poisoned(self, allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def poisoned(*args: Any, **options: Any) -> Tensor:
            tensor = allocate(*args, **options)
            if type(tensor) is Tensor and tensor.device.type == "cpu" and tensor.numel():
                memory = bytes_of(tensor)
                memory[:] = np.resize(POISON, len(memory))
                if self._operation:
                    self._operation.allocated.append(tensor)
            return tensor

        return poisoned

    def operators(self, kernels: Any) -> SimpleNamespace:
        """The operators of a backend, each watched: a backend of its own for `dispatch.BACKENDS`.

        Args:
            kernels: a namespace with the functions of `schemas.OPERATORS`.
        """
        return SimpleNamespace(**{n: self._watched(n, getattr(kernels, n)) for n in OPERATORS})

    def _watched(self, name: str, operator: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def watched(arguments: Any) -> Any:
            with self.operation(name, tensors_in(arguments)) as operation:
                results = operator(arguments)
                operation.complete(tensors_in(results if isinstance(results, tuple) else [results]))
                for field in ("grad_logits", "gradient"):
                    operation.complete(tensors_in([getattr(arguments, field, None)]))
            return results

        return watched

    @contextmanager
    def operation(self, name: str, arguments: list[Tensor]) -> Iterator[Operation]:
        """Launches that have these tensors in common, and those allocated inside."""
        assert self._operation is None, "an operator inside an operator"
        self._operation = Operation(name, arguments, self.counting)
        try:
            yield self._operation
        finally:
            self.faults += self._operation.machine.faults
            if self.counting:
                self.counters.append(self._operation.machine.counters)
            self._operation = None

    def launch(self, kernel: Any, arguments: Iterable[Tensor] = (), **configuration: Any) -> None:
        """Run a kernel; its tensors need to be named only if it is launched by no operator."""
        if self._operation is None:
            with self.operation(kernel.function.name, list(arguments)):
                return self.launch(kernel, **configuration)
        started = time.perf_counter()
        self._operation.register()
        self._operation.machine.launch(kernel, **configuration)
        self.seconds += time.perf_counter() - started
        self.n_launches += 1
        return None

    def lower(self, key: str, function: Function) -> Kernel:
        """Lower a function, once, to be known by `key`; threads that may disagree are a fault."""
        for line in asymmetric_butterflies(function):
            text = "one thread of a pair rounds the product that the other does not"
            self.faults.append(Fault("asymmetric butterfly", function.name, line, "", text, 1))
        self.lowered[key] = Kernel(function)
        return self.lowered[key]

    def kernels(self) -> Any:
        """The backend whose launches are taken, a namespace of operators."""
        raise NotImplementedError

    @property
    def n_kernels(self) -> int:
        return len(self.lowered)

    def take_faults(self) -> list[Fault]:
        """The faults since the last call."""
        found, self.faults = self.faults, []
        return found


class Operation:
    """The memory that an operator's launches may touch: arguments, and what it allocates."""

    def __init__(self, name: str, arguments: list[Tensor], counting: bool) -> None:
        self.name = name
        self.arguments = arguments
        self.allocated: list[Tensor] = []  # kept, so that no address is given away twice
        self.memory = Memory()
        self.machine = Machine(self.memory, counting=counting)
        self._known: set[int] = set()  # addresses of storages
        self._fresh: set[int] = set()

    def register(self) -> None:
        """Tell the memory of all tensors that it does not know yet."""
        views: dict[int, list[Tensor]] = {}
        for tensor in (*self.arguments, *self.allocated):
            address = tensor.untyped_storage().data_ptr()
            if tensor.numel() and address not in self._known:
                views.setdefault(address, []).append(tensor)
        for address, tensors in views.items():
            fresh = is_fresh(tensors[0])
            layouts = list(dict.fromkeys(map(layout_of, tensors)))
            data = bytes_of(tensors[0])
            self.memory.add(hex(address), address, data, layouts, fresh)
            self._known.add(address)
            if fresh:
                self._fresh.add(address)

    def complete(self, results: list[Tensor]) -> None:
        """Every element of a result must have been written, if none was before."""
        for i, tensor in enumerate(results):
            address = tensor.untyped_storage().data_ptr()
            if address in self._fresh:
                missing = self.memory.unwritten(hex(address))
            else:
                missing = tensor.nbytes if tensor.numel() and is_fresh(tensor) else 0
            if missing:
                text = f"{missing} bytes of result {i}, of shape {tuple(tensor.shape)}"
                self.machine.faults.append(Fault("unwritten result", self.name, 0, "", text, 1))


def tensors_in(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def bytes_of(tensor: Tensor) -> np.ndarray:  # uint8
    """The whole storage of a tensor, in place."""
    storage = tensor.untyped_storage()
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    return np.frombuffer(memory, np.uint8)


def layout_of(tensor: Tensor) -> Layout:
    size = tensor.itemsize
    strides = tuple(stride * size for stride in tensor.stride())
    return Layout(tensor.storage_offset() * size, tuple(tensor.shape), strides, size)


def is_fresh(tensor: Tensor) -> bool:
    """Whether nobody has written to its storage yet."""
    memory = bytes_of(tensor)
    start = memory[: len(POISON)]
    if not np.array_equal(start, POISON[: len(start)]):
        return False
    return np.array_equal(memory, np.resize(POISON, len(memory)))


def summary(faults: Iterable[Fault]) -> str:
    """One line per fault and place, the most frequent first."""
    counted: Counter[str] = Counter()
    for fault in faults:
        place = f"{fault.kernel}, line {fault.line}, {fault.source}"
        counted[f"{fault.kind}: {place}: {fault.text}"] += fault.count
    return "\n".join(f"{count} x {text}" for text, count in counted.most_common(20))
