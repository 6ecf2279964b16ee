"""The arithmetic of TRL's classic PPO trainer: equal to ours, but for its known defects."""

from types import SimpleNamespace

import pytest
import torch
from trl import core
from trl.trainer.ppo_trainer import PPOTrainer
from trl.trainer.utils import AdaptiveKLController, FixedKLController

import kl_kernels
from kl_kernels.integrations import trl

SAME = {"rtol": 1e-6, "atol": 1e-6}


def batch(seed=0, rows=6, length=9):
    """(generator, mask): responses with holes, at different places, one of a single token."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) > 0.3
    mask[0] = torch.arange(length) == 4
    mask[1:, 2] = True
    return generator, mask


def their_trainer(**config):
    """Make the part of a PPOTrainer that its arithmetic reads."""
    defaults = {
        "kl_penalty": "kl",
        "whiten_rewards": False,
        "gamma": 1.0,
        "lam": 0.95,
        "cliprange": 0.2,
        "cliprange_value": 0.2,
        "vf_coef": 0.1,
        "ratio_threshold": 10.0,
    }
    trainer = SimpleNamespace(
        config=SimpleNamespace(**defaults | config), kl_ctl=FixedKLController(0.2)
    )
    trainer._kl_penalty = lambda *args: PPOTrainer._kl_penalty(trainer, *args)
    return trainer


@pytest.mark.exercises("compute_rewards with kl, abs and mse")
@pytest.mark.parametrize(("theirs", "ours"), [("kl", "k1"), ("abs", "abs"), ("mse", "k2")])
@pytest.mark.parametrize("seed", range(3))
def test_rewards(theirs, ours, seed):
    generator, mask = batch(seed)
    logprobs, ref_logprobs = -torch.rand(2, *mask.shape, generator=generator) * 5
    scores = torch.randn(len(mask), generator=generator)
    trainer = their_trainer(kl_penalty=theirs)
    expected, _, kls = PPOTrainer.compute_rewards(
        trainer, scores, logprobs, ref_logprobs, mask.long()
    )
    kl = kl_kernels.kl_penalty(logprobs, ref_logprobs, ours, gradient="detach")
    torch.testing.assert_close(kl, kls, **SAME)
    found = kl_kernels.compute_rewards(scores, kl, mask, 0.2)
    torch.testing.assert_close(found[mask], expected[mask], **SAME)
    assert not found[~mask].any()  # theirs has the KL of what is no response there


@pytest.mark.exercises('kl_penalty "full": token_kl, and kl_rewards from logits')
def test_full_kl():
    generator, mask = batch()
    logits, ref_logits = torch.randn(2, *mask.shape, 40, generator=generator) * 2
    scores = torch.randn(len(mask), generator=generator)
    trainer = their_trainer(kl_penalty="full")
    rewards, _, kls = PPOTrainer.compute_rewards(
        trainer, scores, logits.log_softmax(-1), ref_logits.log_softmax(-1), mask.long()
    )
    token_ids = torch.randint(40, mask.shape, generator=generator)
    found = kl_kernels.token_kl(logits, ref_logits, token_ids, mask=mask)
    torch.testing.assert_close(found.kl[mask], kls[mask], **SAME)
    ours = kl_kernels.kl_rewards(
        logits, ref_logits, token_ids, scores, mask, kl_coef=0.2, kl_estimator="exact"
    )
    torch.testing.assert_close(ours.rewards[mask], rewards[mask], **SAME)


@pytest.mark.exercises("an empty response: TRL raises, ours has no reward anywhere")
def test_empty_response():
    _, mask = batch()
    mask[3] = False
    zeros, scores = torch.zeros(mask.shape), torch.ones(len(mask))
    with pytest.raises(IndexError):
        PPOTrainer.compute_rewards(their_trainer(), scores, zeros, zeros, mask.long())
    rewards = kl_kernels.compute_rewards(scores, zeros, mask, 0.2)
    assert rewards.sum(1).tolist() == [1, 1, 1, 0, 1, 1]


@pytest.mark.exercises("GAE and whitening of advantages")
@pytest.mark.parametrize("seed", range(3))
def test_advantages(seed):
    generator, mask = batch(seed)
    rewards, values = torch.randn(2, *mask.shape, generator=generator)
    _, expected, returns = PPOTrainer.compute_advantages(
        their_trainer(gamma=0.97), values, rewards, mask.float()
    )
    advantages, found = kl_kernels.compute_gae(rewards, values, mask, gamma=0.97, masked="zero")
    torch.testing.assert_close(found[mask], returns[mask], rtol=1e-5, atol=1e-5)
    whitened = kl_kernels.masked_whiten(advantages, mask)
    torch.testing.assert_close(whitened[mask], expected[mask], rtol=1e-5, atol=1e-5)


@pytest.mark.exercises("whitened rewards: with TRL padding changes the returns, not with ours")
def test_whitened_rewards():
    generator, _ = batch()
    rewards, values = torch.randn(2, 4, 6, generator=generator) + 1
    mask = torch.ones(4, 6, dtype=torch.bool)

    def theirs(pad):
        padded = (torch.nn.functional.pad(x, (0, pad)) for x in (values, rewards, mask.float()))
        trainer = their_trainer(whiten_rewards=True)
        return PPOTrainer.compute_advantages(trainer, *padded)[2][:, :6]

    def ours(pad):
        padded = (torch.nn.functional.pad(x, (0, pad)) for x in (rewards, values, mask))
        rewards_, values_, mask_ = padded
        rewards_ = kl_kernels.masked_whiten(rewards_, mask_, shift_mean=False)
        return kl_kernels.compute_gae(rewards_, values_, mask_, masked="zero")[1][:, :6]

    torch.testing.assert_close(ours(0), theirs(0), rtol=1e-5, atol=1e-5)
    assert (theirs(3) - theirs(0)).abs().max() > 0.1
    torch.testing.assert_close(ours(3), ours(0), rtol=1e-6, atol=1e-6)


@pytest.mark.exercises("NaN at a masked position: TRL's advantages are NaN, ours are not")
def test_nan_where_masked():
    generator, mask = batch()
    rewards, values = torch.randn(2, *mask.shape, generator=generator)
    values[~mask] = torch.nan
    _, theirs, _ = PPOTrainer.compute_advantages(their_trainer(), values, rewards, mask.float())
    assert theirs.isnan().all()
    ours, _ = kl_kernels.compute_gae(rewards, values, mask, masked="zero")
    clean, _ = kl_kernels.compute_gae(rewards, values.nan_to_num(), mask, masked="zero")
    assert ours.equal(clean)


@pytest.mark.exercises("masked_mean, masked_var and masked_whiten")
@pytest.mark.parametrize("shift_mean", [True, False])
def test_masked_statistics(shift_mean):
    generator, mask = batch()
    x = torch.randn(mask.shape, generator=generator) * 3 + 5
    weights = mask.float()
    found = (
        kl_kernels.masked_mean(x, mask),
        kl_kernels.masked_var(x, mask),
        kl_kernels.masked_whiten(x, mask, shift_mean=shift_mean)[mask],
    )
    expected = (
        core.masked_mean(x, weights),
        core.masked_var(x, weights),
        core.masked_whiten(x, weights, shift_mean=shift_mean)[mask],
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.exercises("AdaptiveKLController, to the bit")
def test_controller():
    generator = torch.Generator().manual_seed(0)
    theirs = AdaptiveKLController(0.2, 6.0, 10000)
    ours = kl_kernels.AdaptiveKLController(0.2, 6.0, 10000, unit="sequence_sum")
    for kl in (torch.rand(500, generator=generator) * 20).tolist():
        theirs.update(kl, 64)
        ours.update(kl, 64)
        assert ours.value == theirs.value
    assert ours.value != 0.2


@pytest.mark.exercises("policy and value loss: loss, gradient, metrics")
@pytest.mark.parametrize("seed", range(3))
def test_losses(seed):
    generator, mask = batch(seed)
    old, advantages, values, returns, noise = torch.randn(5, *mask.shape, generator=generator)
    logits = torch.randn(*mask.shape, 30, generator=generator)
    logprobs = (old + 0.3 * noise).requires_grad_()
    vpreds = (values + 0.5 * noise).requires_grad_()
    pg_loss, vf_loss, stats = PPOTrainer.loss(
        their_trainer(), old, values, logits, vpreds, logprobs, mask.float(), advantages, returns
    )
    expected = torch.autograd.grad(pg_loss + vf_loss, (logprobs, vpreds))
    policy, metrics = kl_kernels.ppo_policy_loss(logprobs, old, advantages, mask)
    value, _ = kl_kernels.ppo_value_loss(vpreds, values, returns, mask)
    torch.testing.assert_close(policy, pg_loss, **SAME)
    torch.testing.assert_close(0.1 * value, vf_loss, **SAME)
    found = torch.autograd.grad(policy + 0.1 * value, (logprobs, vpreds))
    torch.testing.assert_close(found, expected, **SAME)
    torch.testing.assert_close(metrics["clip_fraction"], stats["policy/clipfrac"], **SAME)
    torch.testing.assert_close(metrics["approx_kl_k1"], stats["policy/policykl"], **SAME)
    entropy = kl_kernels.token_stats(logits, torch.zeros(mask.shape).long(), mask=mask).entropy
    torch.testing.assert_close(
        kl_kernels.masked_mean(entropy, mask), stats["policy/entropy"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.exercises("logprobs_from_logits and entropy_from_logits; -inf logits")
def test_patched_functions():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 40) * 3, torch.randint(40, (2, 3))
    theirs = core.logprobs_from_logits(logits, labels), core.entropy_from_logits(logits)
    whole = core.logprobs_from_logits(logits, labels, gather=False)
    cut = logits.clone()
    cut[..., 30:] = -torch.inf
    assert core.entropy_from_logits(cut).isnan().all()
    with trl.patch():
        ours = core.logprobs_from_logits(logits, labels), core.entropy_from_logits(logits)
        assert core.logprobs_from_logits(logits, labels, gather=False).equal(whole)
        without = core.entropy_from_logits(logits[..., :30])
        torch.testing.assert_close(core.entropy_from_logits(cut), without, **SAME)
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)
