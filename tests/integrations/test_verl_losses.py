"""The policy loss with verl's signature, by verl's definition of its aggregations."""

from types import SimpleNamespace

import pytest
import torch

from kl_kernels.integrations.verl_losses import policy_loss

MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])


def config(**info):
    return SimpleNamespace(
        clip_ratio=0.2,
        clip_ratio_low=None,
        clip_ratio_high=None,
        get=lambda name, default: default,
        global_batch_info=info,
    )


def loss_of(mode, **info):
    """Return minus the loss of a policy that has not moved: a mean of the advantages."""
    advantages = torch.tensor(
        [[1.0, 2.0, torch.nan, 4.0], [torch.nan] * 4, [8.0] + [torch.nan] * 3]
    )
    log_prob = torch.full(MASK.shape, -1.0, requires_grad=True)
    loss, metrics = policy_loss(log_prob.detach(), log_prob, advantages, MASK, mode, config(**info))
    loss.backward()
    assert log_prob.grad.isfinite().all()
    assert all(isinstance(value, float) for value in metrics.values())
    return -loss.item()


@pytest.mark.parametrize(
    ("mode", "info", "expected"),
    [
        ("token-mean", {}, 15 / 4),
        ("token-mean", {"dp_size": 2, "batch_num_tokens": 10}, 15 / 10 * 2),
        ("token-sum", {"dp_size": 3}, 15 * 3),
        ("seq-mean-token-sum", {}, (7 + 8) / 2),
        ("seq-mean-token-sum", {"dp_size": 2, "global_batch_size": 6}, 15 / 6 * 2),
        ("seq-mean-token-mean", {}, (7 / 3 + 8) / 2),
        ("seq-mean-token-mean", {"dp_size": 2, "global_batch_size": 6}, (7 / 3 + 8) / 6 * 2),
        ("seq-mean-token-sum-norm", {}, 15 / 2 / 4),
        ("seq-mean-token-sum-norm", {"loss_scale_factor": 16}, 15 / 2 / 16),
        (
            "seq-mean-token-sum-norm",
            {"dp_size": 2, "global_batch_size": torch.tensor(6), "loss_scale_factor": 16},
            15 / 6 * 2 / 16,
        ),
    ],
)
def test_aggregations(mode, info, expected):
    assert loss_of(mode, **info) == pytest.approx(expected, rel=1e-6)


def test_a_missing_count_is_named():
    with pytest.raises(ValueError, match="batch_num_tokens is None; with dp_size 2"):
        loss_of("token-mean", dp_size=2)
    with pytest.raises(ValueError, match="global_batch_size is None; with dp_size 2"):
        loss_of("seq-mean-token-sum", dp_size=2)


def test_an_unknown_mode_names_the_known_ones():
    with pytest.raises(ValueError, match=r"loss_agg_mode.*token-sum"):
        loss_of("mean")


def test_a_missing_configuration_is_named():
    with pytest.raises(ValueError, match="config is None"):
        policy_loss(*[torch.zeros(1, 1)] * 3, torch.ones(1, 1))
