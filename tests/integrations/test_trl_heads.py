"""Calls of TRL's output layer: some stay TRL's, and the others agree with logits."""

import pytest
import torch

from kl_kernels.integrations import trl_heads
from kl_kernels.integrations.trl_heads import DivergenceHead, LogprobHead
from kl_kernels.integrations.trl_one_visit import Foreseen, expecting

N, D, V = 6, 5, 17
THEIRS = "what TRL returns"


class Original:
    """TRL's class, which keeps what it is called with."""

    def __init__(self):
        self.calls = []

    def apply(self, *args):
        self.calls.append(args)
        return THEIRS


class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    is_cuda = True


def on_gpu(tensor):
    return tensor.as_subclass(OnGPU).requires_grad_(tensor.requires_grad)


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def arguments(head, place=lambda tensor: tensor, n=N):
    """Hidden states, weight and bias of a policy, and what else the head takes."""
    if head is LogprobHead:
        ids = torch.arange(n) * 2 % V
        return (
            place(normal(n, D)),
            place(normal(V, D)),
            None,
            ids,
            0.7,
            256,
            None,
            1.0,
            ("entropy",),
        )
    policy = place(normal(n, D)), place(normal(V, D)), None
    return *policy, normal(n, D + 1), place(normal(V, D + 1)), None, 0.5, 0.7


HEADS = [LogprobHead, DivergenceHead]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_on_a_gpu_a_head_of_few_tokens_is_theirs_with_a_gradient_and_without(head, grad):
    """Both: a ratio must not be of log-probabilities that were rounded differently."""
    original, args = Original(), arguments(head, on_gpu)
    args[1].requires_grad_()
    with torch.set_grad_enabled(grad):
        assert head(original, None, None).apply(*args) is THEIRS
    (call,) = original.calls
    assert all(given is meant for given, meant in zip(call, args))
    assert len(call) == len(head.PARAMETERS)


def foreseen(n):
    return Foreseen(torch.ones(1, n), torch.ones(1, n, dtype=torch.bool), 1)


@pytest.fixture
def ours(monkeypatch):
    """Functions of this package that are called, by name."""
    called = []
    for name in ("linear_token_stats", "one_visit", "linear_jsd_and_entropy"):
        monkeypatch.setattr(
            trl_heads, name, lambda *a, name=name, **options: called.append(name) or (None, None)
        )
    return called


@pytest.mark.parametrize(
    ("n", "frozen", "known", "expected"),
    [
        (N, True, True, ["one_visit"]),
        (N, True, False, []),
        (8 * N - 1, False, True, []),
        (8 * N, False, True, ["one_visit"]),
        (8 * N, False, False, []),
    ],
)
def test_on_a_gpu_one_visit_is_ours_where_it_pays(n, frozen, known, expected, ours, monkeypatch):
    monkeypatch.setattr(trl_heads, "TOKENS_OF_ONE_VISIT", 8 * N)
    monkeypatch.setattr(trl_heads, "ITS_WIDTH", D)
    original, args = Original(), arguments(LogprobHead, on_gpu, n)
    args[0].requires_grad_()
    args[1].requires_grad_(not frozen)
    with expecting(foreseen(n) if known else None):
        LogprobHead(original, None, None).apply(*args)
    assert ours == expected
    assert len(original.calls) == (not expected)


@pytest.mark.parametrize("weight", ["frozen", "trained"])
def test_a_narrower_layer_needs_more_tokens(weight):
    layer = torch.empty(V, 512, device="meta").requires_grad_(weight == "trained")
    pays = [
        trl_heads.pays_on_gpu(torch.empty(n, 512, device="meta"), layer, foreseen=True)
        for n in (4096, 4 * 4096 - 1, 4 * 4096)
    ]
    assert pays == ([True] * 3 if weight == "frozen" else [False, False, True])


@pytest.mark.parametrize("n", [511, 512])
def test_on_a_gpu_a_divergence_is_ours_from_512_tokens_on(n, ours):
    original, args = Original(), arguments(DivergenceHead, on_gpu, n)
    DivergenceHead(original, None, None).apply(*args)
    assert ours == (["linear_jsd_and_entropy"] if n == 512 else [])


def test_on_a_cpu_one_visit_is_ours_and_a_loss_without_it_too(ours):
    args = arguments(LogprobHead)
    args[0].requires_grad_()
    head = LogprobHead(Original(), None, None)
    with expecting(foreseen(N)):
        head.apply(*args)
        head.apply(*args)  # another call of the same loss
    assert ours == ["one_visit", "linear_token_stats"]


@pytest.mark.parametrize("given", ["is_top1", "logit_scale", "ds_id"])
def test_what_stays_theirs_leaves_the_foreseen_to_others(given, ours):
    args = list(arguments(LogprobHead))
    args[0].requires_grad_()
    if given == "is_top1":
        args[8] = ("log_probs", "is_top1")
    elif given == "logit_scale":
        args[7] = -1.0
    else:
        args[1].ds_id = 3
    head = LogprobHead(Original(), None, None)
    with expecting(foreseen(N)):
        assert head.apply(*args) is THEIRS
        others = arguments(LogprobHead)
        others[0].requires_grad_()
        head.apply(*others)
    assert ours == ["one_visit"]


@pytest.mark.parametrize("head", HEADS)
def test_a_weight_of_zero_3_stays_theirs(head):
    original, args = Original(), arguments(head)
    args[1].ds_id = 7
    assert head(original, None, None).apply(*args) is THEIRS


def test_on_a_cpu_log_probabilities_are_those_of_the_logits():
    original, args = Original(), arguments(LogprobHead)
    hidden, weight, _, ids, temperature, *_ = args
    hidden.requires_grad_()
    logprob, entropy, *others = LogprobHead(original, None, None).apply(*args)
    assert not original.calls
    assert others == [None] * 3
    expected = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    chosen = expected.gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(logprob.double(), chosen, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-5
    )
    (gradient,) = torch.autograd.grad(logprob.sum(), hidden)
    (right,) = torch.autograd.grad(chosen.sum(), hidden)
    torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


def test_on_a_cpu_the_divergence_is_that_of_the_logits():
    original, args = Original(), arguments(DivergenceHead)
    hidden, weight, _, ref_hidden, ref_weight, _, beta, temperature = args
    hidden.requires_grad_()
    divergence, entropy = DivergenceHead(original, None, None).apply(*args)
    assert not original.calls
    logits = [h.double() @ w.double().T for h, w in ((hidden, weight), (ref_hidden, ref_weight))]
    p, q = ((z / temperature).softmax(-1) for z in logits)
    mixture = (1 - beta) * p + beta * q
    expected = (beta * q * (q / mixture).log() + (1 - beta) * p * (p / mixture).log()).sum(-1)
    torch.testing.assert_close(divergence.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(p * p.log()).sum(-1), rtol=1e-5, atol=1e-5)
    assert not entropy.requires_grad
    (gradient,) = torch.autograd.grad(divergence.sum(), hidden)
    (right,) = torch.autograd.grad(expected.sum(), hidden)
    torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)
