"""Record a library's launches without a GPU, by running its own host code.

Tensors are on the meta device and say they are on a GPU, so that host code chooses block sizes,
warps and specialised constants as it would there; nothing is computed. Autograd functions are
called directly: autograd's engine would see the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction, MockTensor

# An H200's answers to the questions that host code asks about the GPU before a launch.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H200",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=141 * 10**9,
    warp_size=32,
    shared_memory_per_multiprocessor=228 * 1024,
    L2_cache_size=50 << 20,
)
ANSWERS: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_bf16_supported": lambda *_: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "get_device_capability": lambda *_: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda *_: PROPERTIES,
    "get_device_name": lambda *_: PROPERTIES.name,
    "device": lambda *_: contextlib.nullcontext(),
    "set_device": lambda *_: None,
    "_lazy_init": lambda: None,
}
NOT_FOR_THE_COMPILER = {"warmup", "grid"}


class MetaAsCuda(TorchFunctionMode):
    """Tensors made on cuda are made on meta, and every tensor says that it is on cuda."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", 0)
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        named = dict(kwargs or {})
        if "device" in named:
            named["device"] = _meta(torch.device(named["device"] or "cpu"))
        return func(*map(_meta, args), **named)


def _meta(value: Any) -> Any:
    is_cuda = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("meta") if is_cuda else value


@dataclass(frozen=True)
class Launch:
    kernel: JITFunction
    arguments: dict[str, Any]  # a MockTensor stands for a pointer
    options: dict[str, Any]  # num_warps and so on, where the host code sets them
    tuned: int = 1  # configurations that an autotuner would try; this is one of them

    @property
    def name(self) -> str:
        return self.kernel.__name__


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Libraries look for a GPU when they are imported, too."""
    with contextlib.ExitStack() as stack:
        for name, answer in ANSWERS.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        yield


def recorded(call: Callable[[], object], *, meta: bool = True) -> list[Launch]:
    """The launches that `call` makes. Without `meta`, of real tensors on the CPU.

    An autotuned kernel gives a launch for each configuration.
    """
    launches: list[Launch] = []
    configuration: list[tuple[int, Any]] = []

    def record(kernel: JITFunction, *args: Any, **kwargs: Any) -> None:
        tuned, config = configuration[-1] if configuration else (1, None)
        given = dict(zip(kernel.arg_names, args)) | kwargs | (config.all_kwargs() if config else {})
        options = {n: v for n, v in given.items() if n not in kernel.arg_names}
        arguments = {n: _stand_in(v) for n, v in given.items() if n in kernel.arg_names}
        kept = {n: v for n, v in options.items() if n not in NOT_FOR_THE_COMPILER}
        launches.append(Launch(kernel, arguments, kept, tuned))

    def try_all(tuner: Autotuner, *args: Any, **kwargs: Any) -> None:
        for config in tuner.configs:
            configuration.append((len(tuner.configs), config))
            tuner.fn.run(*args, **kwargs)
            configuration.pop()

    with pretended_gpu(), torch.no_grad(), contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", record))
        stack.enter_context(patch.object(Autotuner, "run", try_all))
        if meta:
            stack.enter_context(MetaAsCuda())
        call()
    return launches


def _stand_in(value: Any) -> Any:
    return MockTensor(value.dtype, list(value.shape)) if torch.is_tensor(value) else value


class Context:
    """Stands for autograd's between the forward and the backward pass of a function."""

    def __init__(self, **fields: Any) -> None:
        self.needs_input_grad = (True, True, *(False,) * 30)
        self.saved_tensors: tuple[Any, ...] = ()
        vars(self).update(fields)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, _: bool) -> None: ...

    def mark_non_differentiable(self, *_: Any) -> None: ...

    def mark_dirty(self, *_: Any) -> None: ...


def forward_and_backward(function: Any, *inputs: Any, grads: Callable[[Any], tuple]) -> None:
    """Both passes of an autograd function; `grads` makes the gradients of what came out."""
    context = Context()
    out = function.forward(context, *inputs)
    function.backward(context, *grads(out))
