"""A loss that is divided before backward: another pass over the gradients, or none."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kl_kernels

B, T, D, V = 2, 3, 4, 11
IDS = torch.arange(B * T).view(B, T)
MASK = torch.ones(B, T, dtype=torch.bool)
ADVANTAGES = torch.linspace(-1, 1, B * T).view(B, T)
GIVEN = IDS, None, ADVANTAGES, MASK


def of_logits(**options):
    logits = torch.linspace(-2, 3, B * T * V).sin().view(B, T, V).requires_grad_()
    return kl_kernels.fused_policy_loss(logits, *GIVEN, **options)[0], [logits]


def of_hidden(**options):
    hidden = torch.linspace(-2, 3, B * T * D).cos().view(B, T, D).requires_grad_()
    weight = torch.linspace(-2, 3, V * D).sin().view(V, D).requires_grad_()
    return kl_kernels.linear_policy_loss(hidden, weight, *GIVEN, **options)[0], [hidden, weight]


class Passes(TorchDispatchMode):
    """Counts the gradients that are multiplied: read and written once more."""

    def __init__(self):
        super().__init__()
        self.n, self.factors = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.kl_kernels.scale_gradient.default:
            gradient, factor = args[:2]
            self.factors.append(factor.item())
            before = gradient._version, gradient.clone()
            function(*args, **(kwargs or {}))
            self.n += not torch.equal(gradient, before[1])
            return None
        return function(*args, **(kwargs or {}))


def backward(loss):
    with Passes() as passes:
        loss.backward()
    return passes


@pytest.mark.parametrize("loss_of", [of_logits, of_hidden])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 7, 10, 49])
def test_a_loss_that_is_divided(loss_of, steps):
    """One more pass over each gradient; none where `loss_scale` or `denominator` told of it."""
    whole, leaves = loss_of()
    gradients = [g / steps for g in torch.autograd.grad(whole, leaves)]
    divided, ours = loss_of()
    passes = backward(divided / steps)
    assert passes.n == (len(leaves) if steps > 1 else 0)
    for leaf, gradient in zip(ours, gradients):
        torch.testing.assert_close(leaf.grad, gradient)
    told, ours = loss_of(loss_scale=1 / steps)
    torch.testing.assert_close(told, whole)
    passes = backward(told / steps)
    assert passes.factors == [1.0] * len(leaves)
    assert passes.n == 0
    for leaf, gradient in zip(ours, gradients):
        torch.testing.assert_close(leaf.grad, gradient)
    part, ours = loss_of(denominator=float(B * T * steps))
    passes = backward(part)
    assert passes.factors == [1.0] * len(leaves)
    for leaf, gradient in zip(ours, gradients):
        torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("loss_of", [of_logits, of_hidden])
def test_a_gradient_scaler_too(loss_of):
    scale = torch.tensor(65536.0)
    assert backward(loss_of()[0] * scale).n > 0
    assert backward(loss_of(loss_scale=scale)[0] * scale).n == 0
