"""Importance weights as a check of the engine that sampled: docs/how-to/trl-vllm.md."""

import pytest
import torch

import kl_kernels

N, V = 200_000, 50  # tokens, of one distribution


@pytest.fixture
def logits():
    return 2 * torch.randn(V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def weights_of(policy, sampled_from, claimed):
    """Weigh N tokens, given [V] log-probabilities: trainer's, engine's, and those it claims."""
    g = torch.Generator().manual_seed(1)
    ids = torch.multinomial(sampled_from.exp(), N, replacement=True, generator=g)[None]
    return kl_kernels.importance_weights(policy[ids[0]][None], claimed[ids[0]][None], ids >= 0)


def standard_error(policy, sampled_from):
    """Standard error of the mean of N weights with the mean 1."""
    return (((2 * policy - sampled_from).exp().sum() - 1) / N).sqrt().item()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_mean_of_right_weights_is_one(logits, temperature):
    """The mean of p / q over tokens from q is 1, however the engine rounds."""
    policy = (logits / temperature).log_softmax(-1)
    engine = (logits.bfloat16().double() / temperature).log_softmax(-1)
    _, metrics = weights_of(policy, engine, engine)
    assert abs(metrics["weight_mean"] - 1) < 5 * standard_error(policy, engine)
    assert metrics["bounded_fraction"] == 0
    right = (engine.exp() * (engine - policy)).sum()
    assert 0.8 * right < metrics["k3"] < 1.2 * right


def test_raw_log_probabilities_of_another_temperature_show(logits):
    policy = (logits / 0.7).log_softmax(-1)
    _, metrics = weights_of(policy, policy, logits.log_softmax(-1))
    expected = (2 * policy - logits.log_softmax(-1)).exp().sum()
    assert metrics["weight_mean"] == pytest.approx(expected.item(), rel=0.02)
    assert metrics["weight_mean"] > 1.1


def test_tokens_that_were_cut_make_every_weight_too_small(logits):
    policy = logits.log_softmax(-1)
    kept = policy.exp() > 0.02
    engine = logits.masked_fill(~kept, -torch.inf).log_softmax(-1)
    weights, metrics = weights_of(policy, engine, engine)
    mass = policy.exp()[kept].sum()
    torch.testing.assert_close(weights, torch.full_like(weights, mass))
    assert metrics["weight_mean"] == pytest.approx(mass.item())
    assert metrics["weight_mean"] < 0.95


def test_weights_multiply_the_policy_term_alone():
    """The KL and the entropy are not weighted."""
    g = torch.Generator().manual_seed(2)
    x, y = (torch.randn((2, 3, V), generator=g) for _ in range(2))
    ids, mask = torch.randint(V, (2, 3), generator=g), torch.ones(2, 3)
    old, advantages = (0.1 * torch.randn((2, 3), generator=g) - 3 for _ in range(2))
    weights = torch.rand((2, 3), generator=g)
    stats = kl_kernels.token_kl(x, y, ids)

    def fused(**how):
        return kl_kernels.fused_policy_loss(
            x, ids, old, advantages, mask, weights=weights, ref_logits=y, **how
        )[0]

    term, _ = kl_kernels.ppo_policy_loss(stats.logprob, old, advantages, mask, weights=weights)
    torch.testing.assert_close(fused(), term)
    torch.testing.assert_close(
        fused(kl_loss_coef=0.5, entropy_coef=0.25),
        term + (0.5 * stats.kl - 0.25 * stats.entropy).mean(),
    )
