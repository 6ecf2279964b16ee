"""Log-probabilities, entropy, advantages and losses."""

import pytest
import torch
from batches import KINDS, SHAPE, gradient, log_probs, log_probs_near, mask_of, normal
from openrlhf.models import utils
from openrlhf.models.loss import PolicyLoss, ValueLoss, aggregate_loss
from openrlhf.models.utils import compute_entropy, log_probs_from_logits
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

import kl_kernels
from kl_kernels.integrations import openrlhf
from kl_kernels.rl.losses import aggregate

__all__ = ["log_probs"]


@pytest.fixture
def patched():
    with openrlhf.patch() as patch:
        yield patch


def logits_and_labels(dtype=torch.float32, vocabulary=65):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(*SHAPE, vocabulary, generator=generator)
    return logits.to(dtype), torch.randint(0, vocabulary, SHAPE, generator=generator)


@pytest.mark.exercises("log_probs_from_logits: value and gradient")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_are_openrlhfs(patched, temperature):
    logits, labels = logits_and_labels()
    value, grad = gradient(lambda x: utils.log_probs_from_logits(x, labels, temperature), logits)
    # Pass a copy: theirs divides its argument by the temperature in place.
    their_value, their_grad = gradient(
        lambda x: log_probs_from_logits(x * 1, labels, temperature), logits
    )
    torch.testing.assert_close(value, their_value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-6, rtol=1e-5)


@pytest.mark.exercises("log_probs_from_logits: the logits after a call with a temperature")
def test_logits_are_left_as_they_are(patched):
    """Theirs: divided by the temperature, again by every call. Ours: untouched."""
    logits, labels = logits_and_labels()
    ours, theirs = logits.clone(), logits.clone()
    utils.log_probs_from_logits(ours, labels, 0.5)
    log_probs_from_logits(theirs, labels, 0.5)
    assert torch.equal(ours, logits)
    assert torch.equal(theirs, logits * 2)


@pytest.mark.exercises("log_probs_from_logits: bfloat16")
def test_log_probabilities_of_bfloat16_are_not_rounded(patched):
    """Theirs: 8 bits of a log-probability. Ours: float32's 24, of the same logits."""
    logits, labels = logits_and_labels(torch.bfloat16)
    exact = logits.double().log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    ours, theirs = (f(logits, labels) for f in (utils.log_probs_from_logits, log_probs_from_logits))
    assert (ours.dtype, theirs.dtype) == (torch.float32, torch.bfloat16)
    assert (ours - exact).abs().max() < 1e-5
    assert (theirs - exact).abs().max() > 1e-3


@pytest.mark.exercises("compute_entropy: value and gradient, -inf logits")
def test_entropy_is_openrlhfs(patched):
    """With a token ruled out theirs is 0 * -inf = NaN, ours the entropy of the others."""
    logits, _ = logits_and_labels()
    value, grad = gradient(utils.compute_entropy, logits)
    their_value, their_grad = gradient(compute_entropy, logits)
    torch.testing.assert_close(value, their_value, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-5, rtol=1e-4)
    ruled_out = logits.clone()
    ruled_out[..., 40:] = -torch.inf
    assert compute_entropy(ruled_out).isnan().all()
    others = compute_entropy(logits[..., :40].contiguous())
    torch.testing.assert_close(utils.compute_entropy(ruled_out), others, atol=1e-5, rtol=1e-5)


@pytest.mark.exercises("GAE: advantages and returns")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae_is_openrlhfs(kind, gamma, lam):
    mask, rewards, values = mask_of(kind), normal(1), normal(2)
    theirs = RemoteExperienceMaker.get_advantages_and_returns(
        None, values, rewards, mask, gamma, lam
    )
    ours = kl_kernels.compute_gae(rewards, values, mask, gamma=gamma, lam=lam, masked="zero")
    for own, their in zip(ours, theirs):
        torch.testing.assert_close(own[mask], their[mask], atol=1e-5, rtol=1e-4)


@pytest.mark.exercises("policy loss: clipping, dual clip and both aggregations")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dual_clip", [None, 1.5])
@pytest.mark.parametrize("token_level_loss", [True, False])
def test_the_policy_loss_is_openrlhfs(log_probs, kind, dual_clip, token_level_loss):
    mask, old, advantages = mask_of(kind), log_probs_near(log_probs, 0.5, seed=1), normal(2)
    if kind != "full":
        mask[2] = False
    loss = PolicyLoss(0.2, 0.3, dual_clip, token_level_loss=token_level_loss)

    def theirs(x):
        value, seen["theirs"], seen["kl"], *_ = loss(x, old, advantages, mask)
        return value

    def ours(x):
        value, seen["ours"] = kl_kernels.ppo_policy_loss(
            x,
            old,
            advantages,
            mask,
            clip_low=0.2,
            clip_high=0.3,
            dual_clip=dual_clip,
            aggregation="token-mean" if token_level_loss else "seq-mean-token-mean",
        )
        return value

    seen = {}
    value, grad = gradient(ours, log_probs)
    their_value, their_grad = gradient(theirs, log_probs)
    torch.testing.assert_close(value, their_value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(seen["ours"]["clip_fraction"], seen["theirs"])
    torch.testing.assert_close(seen["ours"]["approx_kl_k1"], seen["kl"])
    assert 0 < seen["theirs"] < 1


@pytest.mark.exercises("policy loss: TIS and IcePop weights")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("theirs", "ours"), [("clip", "truncate"), ("mask", "mask")])
def test_importance_weights_are_openrlhfs(log_probs, kind, theirs, ours):
    mask, old, advantages = mask_of(kind), log_probs_near(log_probs, 0.5, seed=1), normal(2)
    rollout = log_probs_near(old, 1.5, seed=3)
    loss = PolicyLoss(is_correction_level="token", is_correction_mode=theirs)
    their_value, *_, filtered = loss(log_probs, old, advantages, mask, rollout)
    weights, metrics = kl_kernels.importance_weights(
        old, rollout, mask, mode=ours, low=0.5, high=5.0
    )
    value, _ = kl_kernels.ppo_policy_loss(log_probs, old, advantages, mask, weights=weights)
    torch.testing.assert_close(value, their_value)
    torch.testing.assert_close(metrics["bounded_fraction"], filtered)
    assert 0 < filtered < 1


@pytest.mark.exercises("value loss")
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_loss_is_openrlhfs(kind):
    mask, old, returns = mask_of(kind), normal(1), normal(2)
    values = old + 0.4 * normal(3)
    loss = ValueLoss(clip_eps=0.2)
    ours, grad = gradient(
        lambda x: kl_kernels.ppo_value_loss(x, old, returns, mask, clip_range=0.2)[0], values
    )
    theirs, their_grad = gradient(lambda x: loss(x, old, returns, mask), values)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(grad, their_grad)


@pytest.mark.exercises("loss aggregation with the counts of the whole batch")
@pytest.mark.parametrize("kind", KINDS)
def test_aggregation_is_openrlhfs(kind):
    mask, loss = mask_of(kind), normal(1)
    for token_level, name, counts, denominator in (
        (True, "token-mean", {"batch_num_tokens": 170, "dp_size": 4}, 170 / 4),
        (False, "seq-mean-token-mean", {"global_batch_size": 23, "dp_size": 4}, 23 / 4),
    ):
        theirs = aggregate_loss(loss, mask, token_level, **counts)
        torch.testing.assert_close(aggregate(loss, mask, name, denominator), theirs)
