"""The two rules of stopping early, against plain loops that state them, and on several ranks."""

import math

import pytest
import torch
import torch.distributed as dist

from kl_kernels import KLEarlyStop, kl_penalty

TARGET = 0.02
EPOCHS, MINIBATCHES = 3, 4
CURVES = {
    "never": [0.0] * 12,
    "in the first epoch": [0.0, 0.029, 0.031, 0.05] + [0.06] * 8,
    "a peak within an epoch": [0.0, 0.5, 0.01, 0.0] + [0.01] * 8,
    "between the two limits": [0.025] * 12,
    "late": [0.001] * 7 + [0.021] + [0.031] * 4,
    "not a number": [0.0, 0.0, math.nan] + [0.0] * 9,
}


def steps(early_stop, kls):
    """The minibatches whose step a training loop takes."""
    taken = []
    for epoch in range(EPOCHS):
        for minibatch in range(epoch * MINIBATCHES, (epoch + 1) * MINIBATCHES):
            if early_stop.before_step(kls[minibatch]):
                break
            taken.append(minibatch)
        if early_stop.after_epoch():
            break
    return taken


def stable_baselines3(kls):
    """Each minibatch is measured before its step; above 1.5 x target all training ends."""
    exceeded = [i for i, kl in enumerate(kls) if kl > 1.5 * TARGET or math.isnan(kl)]
    return list(range(min([*exceeded, len(kls)])))


def cleanrl(kls):
    """After each epoch, the last minibatch's figure above the target ends training."""
    last = [i for i in range(MINIBATCHES - 1, len(kls), MINIBATCHES) if kls[i] > TARGET]
    return list(range(min([*last, len(kls) - 1]) + 1))


@pytest.mark.parametrize("name", CURVES)
def test_the_rule_of_stable_baselines3(name):
    assert steps(KLEarlyStop(TARGET), CURVES[name]) == stable_baselines3(CURVES[name])


@pytest.mark.parametrize("name", CURVES)
def test_the_rule_of_cleanrl(name):
    assert steps(KLEarlyStop(TARGET, when="after_epoch"), CURVES[name]) == cleanrl(CURVES[name])


def test_the_curves_tell_the_rules_apart():
    pairs = {name: (stable_baselines3(kls), cleanrl(kls)) for name, kls in CURVES.items()}
    assert len({str(pair) for pair in pairs.values()}) == len(CURVES)
    assert sum(a != b for a, b in pairs.values()) >= 4


def test_the_next_batch_starts_afresh():
    early_stop = KLEarlyStop(TARGET)
    assert early_stop.before_step(1.0)
    assert early_stop.after_epoch()
    assert not early_stop.before_step(0.0)
    assert not early_stop.after_epoch()


def test_per_token_kl_is_averaged_under_the_mask():
    kl = torch.tensor([[0.04, 0.0, torch.nan], [0.05, torch.nan, torch.nan]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert not KLEarlyStop(0.0201, tolerance=1.0).before_step(kl, mask)
    assert KLEarlyStop(0.0199, tolerance=1.0).before_step(kl, mask)


def test_k3_of_old_and_new_policy_is_what_both_projects_measure():
    old, new = torch.randn(2, 4, 5, dtype=torch.float64)
    log_ratio = new - old
    expected = (log_ratio.exp() - 1 - log_ratio).mean().item()
    per_token, mask = kl_penalty(old, new, "k3"), torch.ones(4, 5)
    assert KLEarlyStop(expected * 0.999, tolerance=1.0).before_step(per_token, mask)
    assert not KLEarlyStop(expected * 1.001, tolerance=1.0).before_step(per_token, mask)


def stops(group, kl):
    rank = dist.get_rank(group)
    mask = torch.ones(1, 2)
    return KLEarlyStop(TARGET).before_step(kl[rank : rank + 1], mask, group=group)


def test_all_ranks_stop_together(ranks):
    """Alone, the first would stop and the other would not; the mean of both decides."""
    for first, expected in ((0.1, True), (0.035, False)):
        kl = torch.tensor([[first, first], [0.0, 0.0]])
        assert ranks(stops, kl, n=2) == [expected, expected]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0.0}, "target_kl is 0"),
        ({"target_kl": -0.1}, "target_kl is -0.1"),
        ({"target_kl": math.inf}, "target_kl is inf"),
        ({"when": "after_step"}, "when is 'after_step'; accepted: 'before_step', 'after_epoch'"),
        ({"tolerance": 0.0}, "tolerance is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KLEarlyStop(**{"target_kl": TARGET} | options)


def test_the_limit_itself_is_allowed():
    rule = KLEarlyStop(TARGET, tolerance=1.0)
    assert not rule.before_step(TARGET)
    assert rule.before_step(math.nextafter(TARGET, 1))


def test_nothing_measured_stops_nothing():
    assert not KLEarlyStop(1e-9, when="after_epoch").after_epoch()
