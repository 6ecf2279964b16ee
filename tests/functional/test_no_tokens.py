"""Batches, minibatches and ranks without a token: loss 0, gradient 0, and no controller moves."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist

import kl_kernels
from kl_kernels import (
    AdaptiveKLController,
    FixedKLController,
    KLEarlyStop,
    KLMonitor,
    PIKLController,
    ThresholdKLController,
)
from kl_kernels.integrations import trl, verl
from kl_kernels.integrations.verl_losses import LOSS_AGG_MODES, policy_loss
from kl_kernels.rl.losses import AGGREGATIONS, aggregate, token_weights

BACKENDS = ("reference", "cpu", "triton")
NO_COUNT = {
    "none": None,
    "int": 0,
    "float": 0.0,
    "numpy": np.int64(0),
    "tensor": torch.tensor(0),
    "float tensor": torch.tensor(0.0),
}


def nothing(shape):
    """Return values that are all NaN, and a mask that leaves none of them."""
    return torch.full(shape, torch.nan), torch.zeros(shape)


LOSSES = {
    "aggregate": lambda x, mask, **of: aggregate(x, mask, of["aggregation"], of["denominator"]),
    "policy": lambda x, mask, **of: kl_kernels.ppo_policy_loss(x, x.detach(), x, mask, **of)[0],
    "value": lambda x, mask, **of: kl_kernels.ppo_value_loss(x, x.detach(), x, mask, **of)[0],
}


@pytest.mark.parametrize("denominator", NO_COUNT.values(), ids=NO_COUNT)
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("loss_of", LOSSES.values(), ids=LOSSES)
def test_a_count_of_0_is_a_loss_and_a_gradient_of_0(loss_of, mode, denominator):
    for shape in ((2, 3), (0, 3), (2, 0)):
        x, mask = nothing(shape)
        x.requires_grad_()
        loss = loss_of(x, mask, aggregation=mode, denominator=denominator)
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].any()


@pytest.mark.parametrize("denominator", NO_COUNT.values(), ids=NO_COUNT)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_count_of_0_is_a_fused_loss_and_gradient_of_0(backend, denominator):
    logits = torch.full((2, 3, 5), torch.nan, requires_grad=True)
    x, mask = nothing((2, 3))
    loss, metrics = kl_kernels.fused_policy_loss(
        logits, mask.long(), x, x, mask, denominator=denominator, backend=backend
    )
    loss.backward()
    assert all(value == 0 for value in (loss, *metrics.values()))
    assert not logits.grad.any()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_an_empty_micro_batch_changes_nothing_of_what_is_accumulated(as_tensor):
    x = torch.tensor([[1.0, 2.0], [0.0, 0.0], [4.0, 0.0]], requires_grad=True)
    mask = torch.tensor([[1, 1], [0, 0], [1, 0]])
    whole = torch.autograd.grad(aggregate(x, mask), x)[0]
    count = mask.sum() if as_tensor else 3
    for row in range(3):
        aggregate(x[row : row + 1], mask[row : row + 1], denominator=count).backward()
    assert torch.equal(x.grad, whole)


ONE_TOKEN = torch.ones(1, 1)
WRONG = [
    (0, ValueError, r"denominator is 0; it must be a finite number above 0"),
    (np.float64(0), ValueError, r"denominator is 0.0; it must"),
    (torch.tensor(0), ValueError, r"denominator is 0; it must"),
    (torch.tensor(-1.0), ValueError, r"denominator is -1.0; it must"),
    (torch.tensor(torch.nan), ValueError, r"denominator is nan; it must"),
    (torch.tensor(torch.inf), ValueError, r"denominator is inf; it must"),
    (-2, ValueError, r"denominator is -2; it must"),
    (math.nan, ValueError, r"denominator is nan; it must"),
    (torch.ones(1), ValueError, r"denominator has shape \(1,\); it must be a number or 0-dim"),
    (torch.ones(2, 3), ValueError, r"denominator has shape \(2, 3\)"),
    (torch.ones((), device="meta"), ValueError, r"denominator is on meta, mask on cpu"),
    ("3", TypeError, r"denominator is '3'"),
]


@pytest.mark.parametrize(("denominator", "error", "said"), WRONG)
def test_a_denominator_that_can_be_none_is_named(denominator, error, said):
    logits, ids = torch.zeros(1, 1, 3), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(error, match=said):
        aggregate(ONE_TOKEN, ONE_TOKEN, denominator=denominator)
    with pytest.raises(error, match=said):
        kl_kernels.ppo_policy_loss(
            -ONE_TOKEN, -ONE_TOKEN, ONE_TOKEN, ONE_TOKEN, denominator=denominator
        )
    with pytest.raises(error, match=said):
        kl_kernels.ppo_value_loss(*[ONE_TOKEN] * 4, denominator=denominator)
    with pytest.raises(error, match=said):
        kl_kernels.fused_policy_loss(
            logits, ids, -ONE_TOKEN, ONE_TOKEN, ONE_TOKEN, denominator=denominator
        )


@pytest.mark.parametrize("denominator", [-1, torch.tensor(-1), math.nan])
def test_a_wrong_denominator_is_named_without_tokens_too(denominator):
    with pytest.raises(ValueError, match="denominator is"):
        aggregate(*nothing((2, 3)), denominator=denominator)


def test_where_looking_would_wait_for_a_device_its_shape_alone_is_checked():
    mask = torch.ones(2, 3, device="meta")
    for denominator in (torch.zeros((), device="meta"), torch.tensor(0.0), 0):
        assert token_weights(mask, "token-mean", denominator).shape == (2, 3)
    with pytest.raises(ValueError, match=r"denominator has shape \(1,\)"):
        token_weights(mask, "token-mean", torch.zeros(1, device="meta"))


@pytest.mark.parametrize("count", [0, 2.5, torch.tensor(0), torch.tensor(3)])
def test_losses_compile_into_one_graph_with_any_denominator(count):
    def loss(x, mask):
        return aggregate(x, mask, "token-mean", count)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, mask = torch.tensor([[1.0, 2.0]]), torch.full((1, 2), float(count) > 0)
    assert torch.equal(compiled(x, mask), loss(x, mask))


# Trainers


def verls(**info):
    return SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=None,
        get=lambda name, default: default,
        global_batch_info=info,
    )


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
@pytest.mark.parametrize("mode", LOSS_AGG_MODES)
def test_verl_s_counts_of_0(mode, count):
    info = {"dp_size": 2, "batch_num_tokens": count, "global_batch_size": count}
    for extra in ({}, {"loss_scale_factor": 16}):
        x, mask = nothing((2, 3))
        x.requires_grad_()
        loss, metrics = policy_loss(x.detach(), x, x, mask, mode, verls(**info, **extra))
        assert loss == 0
        assert not torch.autograd.grad(loss, x)[0].any()
        assert set(metrics.values()) == {0.0}


def test_verl_s_controller_is_not_steered_by_a_batch_without_tokens():
    steered = []
    controller = SimpleNamespace(value=0.1, update=lambda **of: steered.append(of))
    for n_tokens in (3, 0, 3):
        mask = torch.zeros(1, 4)
        mask[:, :n_tokens] = 1
        batch = {
            "response_mask": mask,
            "old_log_probs": torch.full((1, 4), -1.0),
            "ref_log_prob": torch.full((1, 4), -2.0),
            "token_level_scores": torch.zeros(1, 4),
        }
        data = SimpleNamespace(batch=type("Batch", (dict,), {"batch_size": (1,)})(batch))
        _, metrics = verl._apply_kl_penalty(data, controller)
        assert metrics["actor/reward_kl_penalty"] == (1.0 if n_tokens else 0.0)
        assert data.batch["token_level_rewards"].sum() == pytest.approx(-0.1 * n_tokens)
    assert len(steered) == 2


@pytest.mark.parametrize("count", [0, torch.tensor(0)])
def test_trl_s_divergence_of_no_items_is_0(count):
    student = torch.randn(1, 2, 5, requires_grad=True)
    loss = trl._generalized_jsd_loss(
        student,
        torch.randn(1, 2, 5),
        torch.full((1, 2), -100),
        num_items_in_batch=count,
        original=None,
        backend=None,
    )
    loss.backward()
    assert loss == 0
    assert not student.grad.any()


# Controllers and early stopping


STEERED = {
    "fixed": lambda: FixedKLController(0.1),
    "adaptive": lambda: AdaptiveKLController(0.1, 6.0, 100, unit="sequence_sum"),
    "threshold": lambda: ThresholdKLController(0.1, 6.0, unit="sequence_sum"),
    "pi": lambda: PIKLController(0.1, 6.0, unit="sequence_sum"),
}
MASK = torch.ones(2, 3)
KLS = [torch.full((2, 3), kl) for kl in (2.0, 3.5, 0.5, 9.0, 2.0)]


@pytest.mark.parametrize("make", STEERED.values(), ids=STEERED)
def test_a_controller_stands_still_and_goes_on_as_if_there_had_been_no_such_batch(make):
    plain, interrupted = make(), make()
    for kl in KLS:
        before = interrupted.state_dict(), interrupted.value
        for mask in (torch.zeros(2, 3), torch.zeros(2, 0), torch.zeros(0, 3)):
            garbage = torch.full(mask.shape, torch.nan)
            update = interrupted.update(garbage, 64, mask=mask)
            assert math.isnan(update.kl)
            assert update[1:] == (before[1], 0.0, False)
        assert (interrupted.state_dict(), interrupted.value) == before
        assert interrupted.update(kl, 64, mask=MASK) == plain.update(kl, 64, mask=MASK)
        resumed = make()
        resumed.load_state_dict(interrupted.state_dict())
        interrupted = resumed
    assert interrupted.state_dict() == plain.state_dict()


def over_ranks(group, names, empty_ranks):
    """Updates of each controller; those of `empty_ranks` have no token at the second."""
    here = dist.get_rank(group)
    found = {}
    for name in names:
        controller = STEERED[name]()
        found[name] = [
            controller.update(
                kl[here : here + 1],
                64,
                mask=MASK[:1] * (step != 1 or here not in empty_ranks),
                group=group,
            )
            for step, kl in enumerate(KLS)
        ]
    return found


def test_ranks_without_tokens(ranks):
    """One of two leaves the other's KL; both leave none."""
    for empty_ranks in ((1,), (0, 1)):
        first, other = ranks(over_ranks, tuple(STEERED), empty_ranks, n=2)
        for name, make in STEERED.items():
            alone = make()
            for step, kl in enumerate(KLS):
                got = first[name][step]
                assert str(got) == str(other[name][step])
                if step == 1 and len(empty_ranks) == 2:
                    assert math.isnan(got.kl)
                    assert not got.applied
                    assert got.value == alone.value
                    continue
                expected = alone.update(kl, 64, mask=MASK)
                assert got == expected


@pytest.mark.parametrize("when", ["before_step", "after_epoch"])
def test_early_stopping_looks_past_a_minibatch_without_tokens(when):
    far, near = torch.full((1, 2), 0.5), torch.zeros(1, 2)
    mask, none = torch.ones(1, 2), torch.zeros(1, 2)
    stop = KLEarlyStop(0.02, when=when)
    assert not stop.before_step(near, mask)
    assert not stop.before_step(far, none)
    assert not stop.after_epoch()
    assert stop.before_step(far, mask) == (when == "before_step")
    # The epoch's last minibatch has no token: the one before it is its last word.
    stop.before_step(near, none)
    assert stop.after_epoch()
    # The next batch begins with one: it is not stopped by the batch before.
    assert not stop.before_step(far, none)
    assert not stop.before_step(near, mask)
    assert not stop.after_epoch()


def stops(group, empty_ranks):
    rank = dist.get_rank(group)
    mask = torch.full((1, 2), float(rank not in empty_ranks))
    return KLEarlyStop(0.02).before_step(torch.full((1, 2), 0.5), mask, group=group)


def test_early_stopping_of_ranks_without_tokens(ranks):
    assert ranks(stops, (1,), n=2) == [True, True]
    assert ranks(stops, (0, 1), n=2) == [False, False]


def observed(group, empty_ranks):
    monitor = KLMonitor(kl_budget=1.0)
    here = 0 if group is None else dist.get_rank(group)
    events = []
    for step, kl in enumerate([0.0, 0.1, 0.1, 0.1]):
        mask = torch.full((1, 2), float(step != 2 or here not in empty_ranks))
        values = torch.where(mask.bool(), torch.full((1, 2), kl), torch.nan)
        events += monitor.observe(
            step, kl=values, entropy=values + 1, ratio=values + 1, mask=mask, group=group
        )
    return [event.kind for event in events], monitor.state_dict()


def test_a_monitor_leaves_out_a_batch_without_tokens(ranks):
    events, state = observed(None, (0,))
    assert events == []
    plain = KLMonitor(kl_budget=1.0)
    for step, kl in ((0, 0.0), (1, 0.1), (3, 0.1)):
        values = torch.full((1, 2), kl)
        plain.observe(step, kl=values, entropy=values + 1, ratio=values + 1, mask=torch.ones(1, 2))
    assert state == plain.state_dict()
    assert ranks(observed, (0, 1), n=2) == [([], state)] * 2
