"""Torch's global settings, which callers may change, change no result."""

import random
import warnings

import pytest
import torch
from fuzz_calls import FUNCTIONS, valid_arguments

import kl_kernels
from kl_kernels import AdaptiveKLController, KLEarlyStop, KLMonitor
from kl_kernels.monitor import summarize_drift

SEEDS = range(3)


@pytest.fixture(params=["device", "float64", "bfloat16"])
def setting(request):
    """A function that makes the setting; it is undone after the test."""
    if request.param == "device":
        yield lambda: torch.set_default_device("meta")
    else:
        yield lambda: torch.set_default_dtype(getattr(torch, request.param))
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def outcome(name, arguments):
    """Results and gradients of a call."""
    leaves = [
        value.requires_grad_()
        for key, value in arguments.items()
        if key in ("logits", "hidden", "logprobs", "values", "x") and value.is_floating_point()
    ]
    if name == "kl_penalty":
        arguments = {"gradient": "detach"} | arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = getattr(kl_kernels, name)(**arguments)
    results = [result] if isinstance(result, torch.Tensor) else list(result)
    tensors = [r for r in results if isinstance(r, torch.Tensor)]
    tensors += [t for r in results if isinstance(r, dict) for t in r.values()]
    differentiable = [t for t in tensors if t.requires_grad]
    grads = []
    if differentiable:
        ones = [torch.ones_like(t) for t in differentiable]
        grads = torch.autograd.grad(differentiable, leaves, ones, allow_unused=True)
    return [t.detach() for t in tensors], list(grads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name, setting):
    expected = [outcome(name, valid_arguments(name, random.Random(seed))) for seed in SEEDS]
    arguments = [valid_arguments(name, random.Random(seed)) for seed in SEEDS]
    setting()
    for given, (results, grads) in zip(arguments, expected):
        again, grads_again = outcome(name, given)
        for got, wanted in zip(again + grads_again, results + grads, strict=True):
            assert (got is None) == (wanted is None)
            if got is not None:
                assert (got.device, got.dtype) == (wanted.device, wanted.dtype)
                torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


def test_controllers_monitor_and_drift(setting):
    kl = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    mask, ids, reward = torch.ones(3, 4), torch.arange(12).view(3, 4), torch.ones(3)

    def found():
        controller = AdaptiveKLController(0.1, 6.0, 100, unit="token_mean")
        monitor = KLMonitor(0.1)
        return (
            controller.update(kl, 3, mask=mask),
            monitor.observe(0, kl=kl, entropy=kl, ratio=kl, reward=reward, mask=mask),
            KLEarlyStop(0.1).before_step(kl, mask),
            summarize_drift(kl, mask, ids, prompt_ids=[1, 2, 2]),
        )

    expected = found()
    setting()
    assert found() == expected
