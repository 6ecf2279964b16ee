"""The output layer with verl's signature, by its formula in float64."""

import doctest

import pytest
import torch

from kl_kernels.integrations import verl_heads
from kl_kernels.integrations.verl import linear_cross_entropy

B, T, D, V = 3, 4, 6, 22
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT = torch.randn(B, T, D, generator=GENERATOR), torch.randn(V, D, generator=GENERATOR)
LABELS = torch.randint(V, (B, T), generator=GENERATOR)
UPSTREAM = torch.linspace(-1, 2, B * T)


def exact(hidden, weight, temperature, reduction):
    logp = (hidden.double() @ weight.double().T / temperature).log_softmax(-1)
    logprob = logp.gather(-1, LABELS[..., None]).flatten()
    entropy = -(logp.exp() * logp).sum(-1).flatten()
    return {"none": logprob, "sum": logprob.sum(), "mean": logprob.mean()}[reduction], entropy


def gradients_of(outputs, leaves):
    logprob, entropy = outputs
    weights = UPSTREAM.to(entropy.dtype)
    of_logprobs = logprob * (weights if logprob.ndim else 0.7)
    return torch.autograd.grad(of_logprobs.sum() + (entropy * weights.flip(0)).sum(), leaves)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "Mean"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(reduction, temperature):
    ours = [t.clone().requires_grad_() for t in (HIDDEN, WEIGHT)]
    right = [t.double().requires_grad_() for t in (HIDDEN, WEIGHT)]
    found = linear_cross_entropy(*ours, LABELS, temperature, reduction)
    expected = exact(*right, temperature, reduction.lower())
    for one, other in zip(found, expected):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients_of(found, ours), gradients_of(expected, right)):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_a_frozen_layer_and_rows_that_are_strided():
    hidden = torch.cat([HIDDEN, HIDDEN], 1)[:, ::2].requires_grad_()
    labels = torch.cat([LABELS, LABELS], 1)[:, ::2]
    logprob, entropy = linear_cross_entropy(hidden, WEIGHT, labels)
    assert logprob.shape == entropy.shape == (B * T,)
    logprob.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_a_reduction_that_is_none():
    with pytest.raises(ValueError, match="reduction is 'max'"):
        linear_cross_entropy(HIDDEN, WEIGHT, LABELS, 1.0, "max")


def of_a_rank(group):
    """Outputs and gradients of a rank's rows of the output layer."""
    n = V // group.size()
    hidden = HIDDEN.clone().requires_grad_()
    weight = WEIGHT[group.rank() * n : (group.rank() + 1) * n].clone().requires_grad_()
    found = linear_cross_entropy(hidden, weight, LABELS, 0.6, "none", group)
    gradients = gradients_of(found, (hidden, weight))
    return [t.detach() for t in (*found, *gradients)]


def test_a_vocabulary_over_ranks(ranks):
    """Gradients of the hidden states sum up to the whole, as what comes before them expects."""
    right = [t.double().requires_grad_() for t in (HIDDEN, WEIGHT)]
    expected = exact(*right, 0.6, "none")
    of_hidden, of_weight = gradients_of(expected, right)
    found = ranks(of_a_rank, n=2)
    for logprob, entropy, _, _ in found:
        torch.testing.assert_close(logprob.double(), expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy.double(), expected[1], rtol=1e-5, atol=1e-5)
    total = sum(rank[2] for rank in found)
    torch.testing.assert_close(total.double(), of_hidden, rtol=1e-4, atol=1e-5)
    whole = torch.cat([rank[3] for rank in found])
    torch.testing.assert_close(whole.double(), of_weight, rtol=1e-4, atol=1e-5)


def test_the_example():
    ran = doctest.testmod(verl_heads)
    assert ran.attempted > 0
    assert ran.failed == 0
