"""Calls of TRL's output layer: some stay TRL's, and the others agree with logits."""

import pytest
import torch

from kl_kernels.integrations.trl_heads import DivergenceHead, LogprobHead

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


def arguments(head, place=lambda tensor: tensor):
    """Hidden states, weight and bias of a policy, and what else the head takes."""
    if head is LogprobHead:
        ids = torch.arange(N) * 2
        return (
            place(normal(N, D)),
            place(normal(V, D)),
            None,
            ids,
            0.7,
            256,
            None,
            1.0,
            ("entropy",),
        )
    policy = place(normal(N, D)), place(normal(V, D)), None
    return *policy, normal(N, D + 1), place(normal(V, D + 1)), None, 0.5, 0.7


HEADS = [LogprobHead, DivergenceHead]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_on_a_gpu_the_head_is_theirs_with_a_gradient_and_without(head, grad):
    """All of them: a ratio must not be of log-probabilities that were rounded differently."""
    original, args = Original(), arguments(head, on_gpu)
    args[1].requires_grad_()
    with torch.set_grad_enabled(grad):
        assert head(original, None, None).apply(*args) is THEIRS
    (call,) = original.calls
    assert all(given is meant for given, meant in zip(call, args))
    assert len(call) == len(head.PARAMETERS)


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
