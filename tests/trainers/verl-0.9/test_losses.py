"""Advantages, policy and value losses, importance weights."""

from functools import cache

import pytest
import torch
from batches import KINDS, gradient, log_probs, log_probs_near, mask_of, normal
from verl.trainer.ppo import core_algos
from verl.trainer.ppo.core_algos import (
    agg_loss,
    compute_gae_advantage_return,
    compute_value_loss,
    get_policy_loss_fn,
)
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_weights
from verl.workers.config import ActorConfig

import kl_kernels
from kl_kernels.integrations import verl
from kl_kernels.rl.losses import AGGREGATIONS, aggregate

__all__ = ["log_probs"]


@cache
def patched_gae():
    # Theirs whitens by a name that is patched too, and so is called where nothing is.
    with verl.patch():
        by_name = core_algos.get_adv_estimator_fn("gae")
        assert by_name is core_algos.compute_gae_advantage_return
        return by_name


@pytest.mark.exercises("GAE: advantages and returns")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae_is_verls_where_there_are_tokens(kind, gamma, lam):
    mask = mask_of(kind)
    rewards, values = normal(1), normal(2)
    theirs = compute_gae_advantage_return(rewards, values, mask.float(), gamma, lam)
    for ours, their in zip(patched_gae()(rewards, values, mask.float(), gamma, lam), theirs):
        torch.testing.assert_close(ours[mask], their[mask], atol=1e-5, rtol=1e-4)
        assert (ours[~mask] == 0).all()
    own, own_returns = kl_kernels.compute_gae(rewards, values, mask, gamma=gamma, lam=lam)
    torch.testing.assert_close(own_returns[mask], theirs[1][mask], atol=1e-5, rtol=1e-4)


@pytest.mark.exercises("GAE: NaN at masked positions")
def test_nan_where_masked_does_not_spread_through_gae():
    """Theirs: NaN in every token before it. Ours: as if it were 0."""
    mask = mask_of("right padding")
    rewards, values = normal(1), normal(2)
    bad = values.masked_fill(~mask, torch.nan)
    theirs, _ = compute_gae_advantage_return(rewards, bad, mask.float(), 1.0, 0.95)
    padded = ~mask.all(1)
    assert theirs[padded].isnan().all()
    ours = patched_gae()(rewards, bad, mask.float(), 1.0, 0.95)
    clean = patched_gae()(rewards, values, mask.float(), 1.0, 0.95)
    torch.testing.assert_close(ours, clean, rtol=0, atol=0)


@pytest.mark.exercises("agg_loss: every mode of ours")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations_are_verls(kind, aggregation):
    mask, loss = mask_of(kind), normal(1)
    if kind != "full":
        mask[2] = False  # a sequence without tokens
    ours = aggregate(loss, mask, aggregation)
    torch.testing.assert_close(ours, agg_loss(loss, mask.float(), aggregation))
    assert ours.abs() > 1e-3


@pytest.mark.exercises("agg_loss: NaN at masked positions")
@pytest.mark.parametrize("aggregation", AGGREGATIONS[1:])
def test_nan_where_masked_does_not_reach_a_sequence_mean(aggregation):
    """Theirs: NaN, but for token-mean. Ours: as if it were 0."""
    mask = mask_of("right padding")
    loss = normal(1).masked_fill(~mask, torch.nan)
    assert agg_loss(loss, mask.float(), aggregation).isnan()
    assert aggregate(loss, mask, aggregation).isfinite()


GLOBAL_BATCH = {
    "alone": {},
    "counts": {"dp_size": 4, "batch_num_tokens": 170, "global_batch_size": 23},
    "budget": {
        "dp_size": 2,
        "batch_num_tokens": 90,
        "global_batch_size": 12,
        "loss_scale_factor": 64,
    },
    "budget alone": {"loss_scale_factor": 64},
}


@cache
def policy_loss(name):
    with verl.patch():
        return core_algos.get_policy_loss_fn(name)


@pytest.mark.exercises('policy loss "kl_kernels": value, gradient and metrics of "vanilla"')
@pytest.mark.parametrize("info", GLOBAL_BATCH)
@pytest.mark.parametrize("mode", ["token-sum", *AGGREGATIONS])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_policy_loss_is_vanillas(log_probs, mode, info, weighted):
    mask = mask_of("holes")
    old = log_probs_near(log_probs, 1.0, seed=1)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        clip_ratio_low=0.2,
        clip_ratio_high=0.3,
        clip_ratio_c=2.5,
        global_batch_info=GLOBAL_BATCH[info],
    )
    weights = normal(3).exp() if weighted else None

    def loss_of(name):
        def loss(x):
            value, metrics = policy_loss(name)(
                old_log_prob=old,
                log_prob=x,
                advantages=normal(2),
                response_mask=mask,
                loss_agg_mode=mode,
                config=config,
                rollout_is_weights=weights,
            )
            seen[name] = metrics
            return value

        return loss

    seen = {}
    value, grad = gradient(loss_of("kl_kernels"), log_probs)
    their_value, their_grad = gradient(loss_of("vanilla"), log_probs)
    torch.testing.assert_close(value, their_value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-7, rtol=1e-5)
    assert seen["kl_kernels"].pop("actor/ppo_kl_k3") > 0
    assert seen["kl_kernels"] == pytest.approx(seen["vanilla"], rel=1e-4, abs=1e-7)
    assert 0 < seen["vanilla"]["actor/pg_clipfrac"] < 1
    assert 0 < seen["vanilla"]["actor/pg_clipfrac_lower"] < 1


@pytest.mark.exercises('policy loss "kl_kernels": counts that are missing')
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_missing_count_is_an_error_as_verls(log_probs, mode):
    config = ActorConfig(
        strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, global_batch_info={"dp_size": 2}
    )
    for name in ("vanilla", "kl_kernels"):
        with pytest.raises(ValueError, match=r"batch_num_tokens|global_batch_size"):
            policy_loss(name)(log_probs, log_probs, normal(2), mask_of("holes"), mode, config)


@pytest.mark.exercises('policy loss "kl_kernels": NaN at masked positions')
def test_nan_where_masked_does_not_reach_the_policys_gradient(log_probs):
    """Theirs: a finite loss with a gradient of NaN. Ours: no gradient there."""
    mask = mask_of("right padding")
    advantages = normal(2).masked_fill(~mask, torch.nan)
    config = ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True)
    grads = {}
    for name in ("vanilla", "kl_kernels"):
        leaf = log_probs.clone().requires_grad_()
        loss, _ = policy_loss(name)(log_probs, leaf, advantages, mask, "token-mean", config)
        assert loss.isfinite()
        loss.backward()
        grads[name] = leaf.grad
    assert grads["vanilla"][~mask].isnan().all()
    assert (grads["kl_kernels"][~mask] == 0).all()
    torch.testing.assert_close(grads["kl_kernels"][mask], grads["vanilla"][mask])


@pytest.mark.exercises("policy losses under other names stay")
def test_other_names_are_verls():
    for name in ("vanilla", "gspo", "cispo"):
        assert policy_loss(name) is get_policy_loss_fn(name)
    with verl.patch():
        assert core_algos.get_policy_loss_fn(name="gspo") is get_policy_loss_fn("gspo")
        assert core_algos.get_policy_loss_fn(name="kl_kernels") is policy_loss("kl_kernels")
        rloo = core_algos.AdvantageEstimator.RLOO
        assert core_algos.get_adv_estimator_fn(rloo) is core_algos.compute_rloo_outcome_advantage
        gae = core_algos.get_adv_estimator_fn(name_or_enum=core_algos.AdvantageEstimator.GAE)
        assert gae is core_algos.compute_gae_advantage_return
    with pytest.raises(ValueError, match="Unsupported loss mode: kl_kernels"):
        get_policy_loss_fn("kl_kernels")


@pytest.mark.exercises("value loss")
@pytest.mark.parametrize("kind", KINDS)
def test_the_value_loss_is_verls(kind):
    mask, old, returns = mask_of(kind), normal(1), normal(2)
    values = old + 0.4 * normal(3)
    value, grad = gradient(
        lambda x: kl_kernels.ppo_value_loss(x, old, returns, mask, clip_range=0.2)[0], values
    )
    theirs, their_grad = gradient(
        lambda x: compute_value_loss(x, returns, old, mask, cliprange_value=0.2)[0], values
    )
    torch.testing.assert_close(value, theirs)
    torch.testing.assert_close(grad, their_grad)


@pytest.mark.exercises("importance weights: TIS and IcePop, per token and per sequence")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(("mode", "threshold"), [("truncate", 2.0), ("mask", "0.5_5.0")])
def test_importance_weights_are_verls(log_probs, kind, level, mode, threshold):
    mask = mask_of(kind)
    rollout = log_probs_near(log_probs, 1.5, seed=1)
    ours, metrics = kl_kernels.importance_weights(log_probs, rollout, mask, mode=mode, level=level)
    theirs, _ = compute_rollout_correction_weights(
        log_probs - rollout, mask.float(), rollout_is=level, rollout_is_threshold=threshold
    )
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    assert 0 < metrics["bounded_fraction"] < 1
