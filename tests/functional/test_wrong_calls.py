"""Natural mistakes: each ends in an error that names the argument, or in the right number.

(Numbers of the wrong type and masks of the wrong meaning: test_numbers.py and test_masks.py.)
"""

import re

import pytest
import torch
from test_numbers import (
    ADVANTAGES,
    CALLS,
    HEADS,
    IDS,
    LOGITS,
    MASK,
    OLD,
    ONE,
    REF_LOGITS,
    SCORES,
    V,
)

import kl_kernels

LEAF = LOGITS.clone().requires_grad_()
NO_TOKEN = torch.zeros_like(MASK)


class ModelOutput:
    logits = LOGITS


# Function, what is changed of its valid arguments, and what the error says.
WRONG = [
    ("token_stats", {"logits": torch.randn(2, 4, V)}, "token_ids has shape (2, 3)"),
    ("token_stats", {"token_ids": IDS[..., None]}, "token_ids has shape (2, 3, 1)"),
    ("token_stats", {"token_ids": IDS.flatten()}, "token_ids has shape (6,)"),
    ("token_stats", {"token_ids": IDS.float()}, "token_ids has dtype torch.float32"),
    ("token_stats", {"token_ids": torch.full_like(IDS, -100)}, "token_ids holds -100"),
    ("token_stats", {"token_ids": torch.full_like(IDS, V)}, f"token_ids holds {V}"),
    ("token_stats", {"token_ids": IDS.tolist()}, "token_ids is a list"),
    ("token_stats", {"logits": LOGITS.numpy()}, "logits is a ndarray"),
    ("token_stats", {"logits": ModelOutput()}, "logits is a ModelOutput"),
    ("token_stats", {"logits": LOGITS.long()}, "logits has dtype torch.int64"),
    ("token_stats", {"mask": torch.ones(2, 4)}, "mask has shape (2, 4)"),
    ("token_stats", {"mask": torch.ones(3)}, "mask has shape (3,)"),
    ("token_stats", {"temperature": 0}, "temperature is 0; it must be"),
    ("token_stats", {"temperature": -1}, "temperature is -1; it must be"),
    ("token_stats", {"temperature": torch.ones(2)}, "temperature is of shape (2,)"),
    ("token_stats", {"masks": MASK}, "'masks'"),
    ("token_stats", {"backend": "cudnn"}, "backend is 'cudnn'"),
    ("token_kl", {"ref_logits": IDS, "token_ids": REF_LOGITS}, "ref_logits has dtype torch.int64"),
    ("token_kl", {"ref_logits": LEAF}, "ref_logits requires grad"),
    ("token_kl", {"ref_logits": torch.randn(2, 3, V + 1)}, "ref_logits has shape (2, 3, 8)"),
    ("token_kl", {"ref_logits": REF_LOGITS[0]}, "ref_logits has shape (3, 7)"),
    ("token_kl", {"ref_logits": REF_LOGITS.to("meta")}, "ref_logits is on meta"),
    ("token_kl", {"mask": IDS + 2, "token_ids": MASK.long()}, "mask holds "),
    ("kl_rewards", {"scores": SCORES[:, None]}, "scores has shape (2, 1)"),
    ("kl_rewards", {"scores": SCORES.tolist()}, "scores is a list"),
    ("kl_rewards", {"scores": ONE[:, :2]}, "scores has shape (2, 2)"),
    ("kl_rewards", {"kl_coef": -0.1}, "kl_coef is -0.1; it must be a finite number, 0 or above"),
    ("compute_rewards", {"kl_coef": -0.1}, "kl_coef is -0.1; it must be a finite number, 0 or"),
    ("fused_policy_loss", {"kl_loss_coef": -0.1}, "kl_loss_coef is -0.1; it must be"),
    ("fused_policy_loss", {"ref_logits": None}, "kl_loss_coef is 0.5 without a reference"),
    ("fused_policy_loss", {"advantages": SCORES}, "advantages has shape (2,)"),
    ("fused_policy_loss", {"advantages": SCORES[:, None]}, "advantages has shape (2, 1)"),
    ("fused_policy_loss", {"old_logprobs": OLD[:, 1:]}, "old_logprobs has shape (2, 2)"),
    ("fused_policy_loss", {"old_logprobs": ONE.exp()}, "old_logprobs holds 0.9"),
    ("ppo_policy_loss", {"old_logprobs": ONE.exp()}, "old_logprobs holds 0.9"),
    ("importance_weights", {"rollout_logprobs": ONE.exp()}, "rollout_logprobs holds 0.9"),
    (
        "fused_policy_loss",
        {"ref_logits": None, "ref_logprobs": ONE.exp(), "kl_estimator": "k3"},
        "ref_logprobs holds 0.9",
    ),
    ("fused_policy_loss", {"aggregation": "mean"}, "aggregation is 'mean'; accepted: 'token-mean'"),
    ("fused_policy_loss", {"kl_estimator": "K3"}, "kl_estimator is 'K3'; accepted: 'exact'"),
    ("fused_policy_loss", {"aggregation": MASK}, "aggregation is of shape (2, 3)"),
    ("kl_penalty", {"ref_logprobs": ONE[:, 1:]}, "ref_logprobs has shape (2, 2)"),
    ("kl_penalty", {"logprobs": LEAF[..., 0], "ref_logprobs": ONE, "kl_penalty": "k1"}, "'k1'"),
    ("compute_gae", {"values": torch.zeros(2, 4)}, "values has shape (2, 4)"),
    ("compute_gae", {"gamma": 1.5}, "gamma is 1.5; accepted: 0 to 1"),
    ("token_jsd", {"beta": 2}, "beta is 2; accepted: 0 to 1"),
    ("linear_token_stats", {"weight": HEADS["weight"].T}, "weight has shape (4, 7)"),
    ("linear_token_stats", {"weight": torch.nn.Linear(4, V)}, "weight is a Linear"),
    ("linear_token_stats", {"hidden": torch.randn(2, 4, 4)}, "token_ids has shape (2, 3)"),
    (
        "linear_token_kl",
        {"ref_weight": HEADS["weight"].clone().requires_grad_()},
        "ref_weight requires grad",
    ),
]


@pytest.mark.parametrize(("function", "changed", "message"), WRONG)
def test_a_wrong_argument_is_named(function, changed, message):
    others, numbers = CALLS[function]
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        getattr(kl_kernels, function)(**{**others, **numbers, **changed})


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        ("fused_policy_loss", "mask"),
        ("kl_rewards", "mask"),
        ("kl_rewards", "kl_coef"),
        ("masked_mean", "mask"),
        ("token_kl", "token_ids"),
    ],
)
def test_a_missing_argument_is_named(function, missing):
    others, numbers = CALLS[function]
    given = {name: value for name, value in {**others, **numbers}.items() if name != missing}
    with pytest.raises(TypeError, match=f"'{missing}'"):
        getattr(kl_kernels, function)(**given)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: kl_kernels.AdaptiveKLController(0.1, 6.0, 10000), "'unit'"),
        (lambda: kl_kernels.KLMonitor(budget=3), "'budget'"),
        (lambda: kl_kernels.token_kll, "'token_kll'"),
    ],
)
def test_a_wrong_name_is_named(make, named):
    with pytest.raises((TypeError, AttributeError), match=named):
        make()


def test_packed_rows_are_told_of_cu_seqlens():
    """Three scores of a row that holds three responses."""
    kl, mask, scores = torch.zeros(1, 14), torch.ones(1, 14), torch.ones(3)
    logits, ids = torch.zeros(1, 14, V), torch.zeros(1, 14, dtype=torch.long)
    for call in (
        lambda: kl_kernels.compute_rewards(scores, kl, mask, 0.1),
        lambda: kl_kernels.kl_rewards(logits, logits, ids, scores, mask, kl_coef=0.1),
        lambda: kl_kernels.length_normalized_scores(scores, mask),
    ):
        with pytest.raises(ValueError, match=r"scores has shape \(3,\).*pass cu_seqlens"):
            call()
    with pytest.raises(ValueError, match=r"scores has shape \(3,\)") as error:
        kl_kernels.compute_rewards(scores, torch.zeros(2, 7), torch.ones(2, 7), 0.1)
    assert "cu_seqlens" not in str(error.value)


# Calls that look like a mistake and have a right result.


def test_ids_of_no_token_may_be_anything_where_masked():
    ids = IDS.masked_fill(~MASK, -100)
    found, expected = (kl_kernels.token_stats(LOGITS, i, MASK) for i in (ids, IDS))
    assert torch.equal(found.logprob, expected.logprob)
    assert (found.logprob[~MASK] == 0).all()


def test_without_a_token_everything_is_zero():
    rewards = kl_kernels.kl_rewards(LOGITS, REF_LOGITS, IDS, SCORES, NO_TOKEN, kl_coef=0.1)
    assert all((output == 0).all() for output in rewards)
    loss, metrics = kl_kernels.fused_policy_loss(LEAF, IDS, OLD, ADVANTAGES, NO_TOKEN)
    (gradient,) = torch.autograd.grad(loss, LEAF)
    assert loss == 0
    assert not gradient.any()
    assert all(value == 0 for value in metrics.values())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64, torch.bfloat16])
def test_scores_of_any_dtype_are_the_numbers_they_hold(dtype):
    scores = torch.tensor([1, 0]).to(dtype)
    found = kl_kernels.kl_rewards(LOGITS, REF_LOGITS, IDS, scores, MASK, kl_coef=0)
    assert found.rewards.tolist() == [[0, 0, 1], [0, 0, 0]]
    by_hand = kl_kernels.compute_rewards(scores, found.kl, MASK, 0)
    assert torch.equal(found.rewards, by_hand)


def test_a_score_that_is_nan_stays_at_its_place():
    scores = torch.tensor([torch.nan, 2.0])
    found = kl_kernels.kl_rewards(LOGITS, REF_LOGITS, IDS, scores, MASK, kl_coef=0).rewards
    assert found.isnan().nonzero().tolist() == [[0, 2]]
    assert found[1].tolist() == [2, 0, 0]


def test_log_probabilities_are_their_own_logits():
    found = kl_kernels.token_kl(LOGITS, REF_LOGITS.log_softmax(-1), IDS)
    for one, other in zip(found, kl_kernels.token_kl(LOGITS, REF_LOGITS, IDS)):
        torch.testing.assert_close(one, other)


def test_constants_of_a_loss_get_no_gradient():
    old, advantages = OLD.clone().requires_grad_(), ADVANTAGES.clone().requires_grad_()
    loss, _ = kl_kernels.fused_policy_loss(LEAF, IDS, old, advantages, MASK)
    expected, _ = kl_kernels.fused_policy_loss(LEAF, IDS, OLD, ADVANTAGES, MASK)
    loss.backward()
    assert loss == expected
    assert old.grad is advantages.grad is None
    values = OLD.clone().requires_grad_()
    advantages, returns = kl_kernels.compute_gae(ADVANTAGES, values, MASK)
    assert not advantages.requires_grad
    assert not returns.requires_grad
    LEAF.grad = None


def test_a_loss_without_a_gradient_has_its_value():
    detached, _ = kl_kernels.fused_policy_loss(LOGITS, IDS, OLD, ADVANTAGES, MASK)
    loss, _ = kl_kernels.fused_policy_loss(LEAF, IDS, OLD, ADVANTAGES, MASK)
    assert not detached.requires_grad
    assert detached == loss


def test_a_second_backward_of_the_fused_loss_is_refused():
    loss, _ = kl_kernels.fused_policy_loss(LEAF, IDS, OLD, ADVANTAGES, MASK)
    loss.backward()
    LEAF.grad = None
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_entropy_may_be_punished():
    options = {"temperature": 0.5}
    plain, metrics = kl_kernels.fused_policy_loss(LOGITS, IDS, OLD, ADVANTAGES, MASK, **options)
    punished, _ = kl_kernels.fused_policy_loss(
        LOGITS, IDS, OLD, ADVANTAGES, MASK, entropy_coef=-0.25, **options
    )
    torch.testing.assert_close(punished, plain + 0.25 * metrics["entropy"])


def test_an_empty_batch_has_empty_outputs():
    found = kl_kernels.token_kl(LOGITS[:0], REF_LOGITS[:0], IDS[:0])
    assert {tuple(output.shape) for output in found} == {(0, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_log_probabilities_that_rounding_lifted_above_zero_are_taken(dtype):
    lifted = torch.tensor([[0.0, 0.005, 0.001]]).to(dtype)
    mask, advantages = torch.ones(1, 3), torch.ones(1, 3)
    loss, _ = kl_kernels.ppo_policy_loss(lifted, lifted, advantages, mask)
    torch.testing.assert_close(loss, torch.tensor(-1.0).to(loss.dtype))
    with_one_below = torch.tensor([[-0.25, 0.5, 0.5]]).to(dtype)  # an engine's business
    assert kl_kernels.importance_weights(lifted, with_one_below, mask)[0].isfinite().all()
