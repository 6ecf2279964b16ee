"""Predicted times of TRL's heads on a GPU and of ours: the rule of which is taken there.

TRL's own code runs on tensors without data, its kernels replaced by operators that read and write
what they do. Both sides are counted by one ledger, at one chip's rates.
"""

from types import SimpleNamespace

import pytest
import torch
from trl.kernels import chunked_divergence, chunked_logprob

from kl_kernels import linear_policy_loss, linear_token_stats
from kl_kernels.functional.hidden_jsd import linear_jsd_and_entropy
from kl_kernels.integrations.trl_heads import (
    ITS_WIDTH,
    TOKENS_OF_A_DIVERGENCE,
    TOKENS_OF_ONE_VISIT,
    pays_on_gpu,
)
from kl_kernels.lab.cost.ledger import Ledger
from kl_kernels.lab.cost.prices import predicted, rates

PAR = 1.005  # nearer than this the rates that are assumed say nothing
V = 151936
LIBRARY = torch.library.Library("trl_kernels", "DEF")
LIBRARY.define("read(Tensor tile, Tensor? other) -> ()")
LIBRARY.define("write_(Tensor(a!) tile, Tensor? other) -> ()")
for name in ("read", "write_"):
    LIBRARY.impl(name, lambda tile, other: None, "Meta")
KERNELS = torch.ops.trl_kernels


class Kernel:
    """Stands for a Triton kernel of one tile, launched by kernel[grid](tile, its stride, ...)."""

    def __init__(self, operator):
        self.operator = operator

    def __getitem__(self, grid):
        return lambda tile, *rest, **options: self.operator(tile, None)


class KernelOfTwo(Kernel):
    """The same of kernel[grid](tile, its stride, other tile, ...)."""

    def __getitem__(self, grid):
        return lambda tile, stride, other, *rest, **options: self.operator(tile, other)


def add_product(sums, a, b):
    torch.addmm(sums, a, b, out_dtype=torch.float32, out=sums)


def project(tile, hidden, weight, bias, start, end, dtype):
    torch.mm(hidden, weight[start:end].to(dtype).t(), out_dtype=torch.float32, out=tile)


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    """Let TRL take the path that it takes on a GPU."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    for module in (chunked_logprob, chunked_divergence):
        monkeypatch.setattr(module, "_use_triton", lambda device: True)
        monkeypatch.setattr(module, "_addmm_fp32", add_product)
        monkeypatch.setattr(
            module, "triton", SimpleNamespace(cdiv=lambda a, b: -(-a // b)), raising=False
        )
    monkeypatch.setattr(chunked_divergence, "_project", project)
    read, write = KERNELS.read, KERNELS.write_
    monkeypatch.setattr(chunked_logprob, "_forward_kernel", Kernel(read))
    monkeypatch.setattr(chunked_logprob, "_backward_kernel", Kernel(write))
    monkeypatch.setattr(chunked_divergence, "_stats_kernel", KernelOfTwo(read))
    monkeypatch.setattr(chunked_divergence, "_jsd_kernel", KernelOfTwo(read))
    monkeypatch.setattr(chunked_divergence, "_backward_kernel", KernelOfTwo(write))


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def head(n, width, frozen):
    hidden, weight = meta(n, width).requires_grad_(), meta(V, width).requires_grad_(not frozen)
    return hidden, weight, [hidden] if frozen else [hidden, weight]


def price(call, leaves, grad=True):
    """Predicted seconds of a call and, with a gradient, of backward from its first output."""
    passes = []
    with torch.set_grad_enabled(grad), Ledger() as forward:
        output = call()[0]
    passes.append(forward)
    if grad:
        with Ledger() as backward:
            torch.autograd.grad(output, leaves, torch.empty_like(output))
        passes.append(backward)
    return sum(predicted(listed.operations, rates("h200")) for listed in passes)


def of_logprobs(hidden, weight):
    ids = meta(len(hidden), dtype=torch.int64)
    outputs = ("log_probs", "entropy")
    return lambda: chunked_logprob.ChunkedLogProbFunction.apply(
        hidden, weight, None, ids, 1.0, 32768, None, 1.0, outputs
    )


@pytest.mark.exercises("heads on a GPU, predicted: log-probabilities that are not foreseen")
@pytest.mark.parametrize(("n", "width"), [(1024, 4096), (8192, 896), (8192, 4096)])
@pytest.mark.parametrize("kind", ["trained", "frozen", "without gradient"])
def test_log_probabilities_stay_trls(n, width, kind):
    hidden, weight, leaves = head(n, width, kind == "frozen")
    ids, grad = meta(n, dtype=torch.int64), kind != "without gradient"
    ours = price(lambda: linear_token_stats(hidden, weight, ids), leaves, grad)
    theirs = price(of_logprobs(hidden, weight), leaves, grad)
    assert ours >= theirs
    assert not pays_on_gpu(hidden, weight, foreseen=False)


@pytest.mark.exercises("heads on a GPU, predicted: GRPO in one visit")
@pytest.mark.parametrize(
    ("n", "width", "frozen"),
    [
        (TOKENS_OF_ONE_VISIT, ITS_WIDTH, False),
        (TOKENS_OF_ONE_VISIT, 4096, False),
        (TOKENS_OF_ONE_VISIT * ITS_WIDTH // 896 + 1, 896, False),
        (32768, 3584, False),
        (512, 896, True),
        (512, 4096, True),
        (32768, 3584, True),
    ],
)
def test_one_visit_is_ours(n, width, frozen):
    hidden, weight, leaves = head(n, width, frozen)
    ids, per_token = meta(1, n, dtype=torch.int64), meta(1, n, dtype=torch.float32)
    mask = torch.ones(1, n, dtype=torch.bool, device="meta")
    assert pays_on_gpu(hidden, weight, foreseen=True)
    ours = price(
        lambda: linear_policy_loss(hidden[None], weight, ids, None, per_token, mask), leaves
    )
    assert ours <= PAR * price(of_logprobs(hidden, weight), leaves)


@pytest.mark.exercises("heads on a GPU, predicted: the divergence of two heads")
@pytest.mark.parametrize("n", [TOKENS_OF_A_DIVERGENCE, 8192])
@pytest.mark.parametrize("width", [896, 4096])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_divergence_is_ours(n, width, frozen, beta):
    student, weight, leaves = head(n, width, frozen)
    teacher = meta(n, width), meta(V, width)
    theirs = price(
        lambda: chunked_divergence.ChunkedDivergenceFunction.apply(
            student, weight, None, *teacher, None, beta
        ),
        leaves,
    )
    ours = price(
        lambda: linear_jsd_and_entropy(
            student,
            weight,
            *teacher,
            bias=None,
            ref_bias=None,
            beta=beta,
            temperature=1.0,
            ref_temperature=None,
            softcap=None,
            ref_softcap=None,
            logit_scale=1.0,
            ref_logit_scale=None,
            memory_budget=None,
            group=None,
            vocab_start=None,
            backend=None,
        ),
        leaves,
    )
    assert ours <= PAR * theirs
