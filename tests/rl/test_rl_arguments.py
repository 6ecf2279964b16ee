"""Arguments of RLHF's arithmetic: the ends of what is accepted, and the name in each refusal."""

import math

import pytest
import torch

import kl_kernels
from kl_kernels import KLEarlyStop, ThresholdKLController
from kl_kernels.rl.losses import aggregate

MASK = torch.tensor([[True, True, False], [True, False, False]])
KL = torch.tensor([[0.1, 0.3, math.nan], [0.2, math.nan, math.nan]])
NO_TOKEN = torch.zeros_like(MASK)


def loss(denominator, mask=MASK):
    values = torch.tensor([[1.0, 2.0, math.nan], [3.0, math.nan, math.nan]])
    return aggregate(values, mask, denominator=denominator)


@pytest.mark.parametrize("denominator", [3, 3.0, torch.tensor(3), torch.tensor(3.0)])
def test_a_denominator_takes_the_place_of_the_count(denominator):
    assert loss(denominator).item() == 2.0
    assert loss(2 * denominator).item() == 1.0


@pytest.mark.parametrize(
    ("denominator", "message"),
    [
        (0, "denominator is 0; it must be a finite number above 0"),
        (torch.tensor(0), "denominator is 0; it must be a finite number above 0"),
        (-1.0, "denominator is -1.0;"),
        (math.inf, "denominator is inf;"),
        (math.nan, "denominator is nan;"),
        (torch.ones(1, 2), r"denominator has shape \(1, 2\); it must be a number or 0-dim"),
        (torch.tensor(1.0, device="meta"), "denominator is on meta, mask on cpu"),
    ],
)
def test_a_denominator_that_is_none_is_refused(denominator, message):
    with pytest.raises(ValueError, match="^" + message):
        loss(denominator)


def test_a_denominator_of_text_is_named():
    with pytest.raises(TypeError, match=r"^denominator is '3', a str; it must be a number"):
        loss("3")


@pytest.mark.parametrize("nothing", [0, 0.0, torch.tensor(0)])
def test_a_batch_without_tokens_may_count_none(nothing):
    aggregate(torch.zeros(2, 3), NO_TOKEN, denominator=nothing)
    with pytest.raises(ValueError, match="denominator is 0"):
        loss(nothing)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ThresholdKLController(0.1, 1.0, unit="token_mean", lower_by=math.nan),
            "lower_by is nan",
        ),
        (
            lambda: ThresholdKLController(0.1, 1.0, unit="token_mean", max_coef="1"),
            "max_coef is '1'",
        ),
        (lambda: KLEarlyStop(0.1).before_step("much"), "kl is 'much'"),
        (lambda: kl_kernels.kl_penalty(KL, KL, "k2", mask=2.0 * MASK), "mask holds 2.0"),
        (lambda: kl_kernels.masked_mean(KL, MASK, dim=2), "dim is 2; x of shape"),
        (lambda: kl_kernels.masked_mean(KL, MASK, dim=-3), "dim is -3; x of shape"),
    ],
)
def test_the_argument_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match="^" + message):
        call()


@pytest.mark.parametrize(
    ("dim", "expected"), [(1, [0.2, 0.2]), (-1, [0.2, 0.2]), (-2, [0.15, 0.3, 0])]
)
def test_dimensions_are_counted_from_both_ends(dim, expected):
    found = kl_kernels.masked_mean(KL, MASK, dim=dim)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(found, kl_kernels.masked_mean(KL, MASK, dim=dim % 2))


def test_a_minibatch_without_tokens_stops_nothing():
    stop = KLEarlyStop(0.1, when="before_step")
    assert stop.before_step(KL, MASK)
    assert stop.before_step(KL, NO_TOKEN) is False


@pytest.mark.parametrize("kl_penalty", ["k2", "k3"])
def test_an_importance_ratio_of_one_changes_nothing(kl_penalty):
    logprobs, reference = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    plain = kl_kernels.kl_penalty(logprobs, reference, kl_penalty)
    weighted = kl_kernels.kl_penalty(logprobs, reference, kl_penalty, old_logprobs=logprobs)
    assert torch.equal(plain, weighted)


def test_a_token_that_cannot_be_sampled_any_more_costs_nothing():
    """Its ratio is 0 and its estimate infinite: the product is 0, and no NaN."""
    logprobs, reference = torch.tensor([-math.inf]), torch.tensor([-1.0])
    found = kl_kernels.kl_penalty(logprobs, reference, "k2", old_logprobs=torch.tensor([-2.0]))
    assert found.item() == 0


@pytest.mark.parametrize(("aggregation", "count"), [("token-mean", 3), ("seq-mean-token-mean", 2)])
def test_a_denominator_over_one_process_is_the_count(aggregation, count):
    assert kl_kernels.global_denominator(MASK, aggregation).item() == count
    assert kl_kernels.global_denominator(NO_TOKEN, aggregation).item() == 0


def test_a_denominator_counts_tokens_in_float32_unless_told_otherwise():
    found = kl_kernels.global_denominator(MASK)
    assert (found.item(), found.dtype) == (3, torch.float32)
    with pytest.raises(ValueError, match=r"^mask holds 2"):
        kl_kernels.global_denominator(2 * MASK)


def test_the_sampling_gap_of_one_token_is_its_own():
    logprob, entropy = torch.tensor([[-3.0, math.nan]]), torch.tensor([[1.0, math.nan]])
    gap = kl_kernels.sampling_gap(logprob, entropy, torch.tensor([[True, False]]))
    assert [value.item() for value in gap] == [2.0, 2.0]
    assert {value.dtype for value in gap} == {torch.float32}
