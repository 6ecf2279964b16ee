"""Batches as trainers have them: responses of several lengths, with padding and with holes."""

import pytest
import torch

SHAPE = (5, 9)
KINDS = ("full", "right padding", "left padding", "holes", "one token each")


def mask_of(kind, shape=SHAPE, seed=0):  # -> [B, T] bool, a token or more in each row
    """Make a mask of the policy's tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = shape
    lengths = torch.randint(1, width + 1, (rows, 1), generator=generator)
    positions = torch.arange(width).expand(shape)
    if kind == "full":
        return torch.ones(shape, dtype=torch.bool)
    if kind == "right padding":
        return positions < lengths
    if kind == "left padding":
        return positions >= width - lengths
    at_random = torch.rand(shape, generator=generator)
    best = at_random == at_random.amax(1, keepdim=True)
    return best if kind == "one token each" else best | (at_random < 0.6)


@pytest.fixture
def log_probs():  # [B, T]
    return -5 * torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) - 0.1


def normal(seed):  # [B, T]
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def log_probs_near(log_probs, spread, seed):  # [B, T] -> [B, T], differences of about `spread`
    generator = torch.Generator().manual_seed(seed)
    return log_probs + spread * torch.randn(log_probs.shape, generator=generator)


def gradient(function, at):  # [...] -> function(at) and the gradient of its weighted sum
    """Weights differ, so that a gradient in the wrong place shows."""
    leaf = at.clone().requires_grad_()
    value = function(leaf)
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weights).sum().backward()
    return value.detach(), leaf.grad / weights if leaf.shape == value.shape else leaf.grad
