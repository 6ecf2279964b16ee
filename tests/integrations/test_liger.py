"""The GRPO loss with Liger's signature, by its formula in float64."""

import doctest

import pytest
import torch

from kl_kernels.integrations import liger
from kl_kernels.integrations.liger import LigerFusedLinearGRPOLoss

B, T, D, V = 4, 6, 5, 23
LENGTHS = torch.tensor([[6], [3], [1], [0]])
MASK = (torch.arange(T) < LENGTHS).long()
ADVANTAGES = torch.tensor([1.0, -0.7, 0.4, 2.0])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


IDS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
HIDDEN, WEIGHT, BIAS = normal(B, T, D), normal(V, D), normal(V)
REF_HIDDEN, REF_WEIGHT = HIDDEN + 0.3 * normal(B, T, D, seed=5), WEIGHT + 0.1 * normal(V, D, seed=6)


def logprobs(hidden, weight, bias=None, temperature=1.0):
    logits = hidden.double() @ weight.double().T
    logits = logits if bias is None else logits + bias.double()
    return (logits / temperature).log_softmax(-1).gather(-1, IDS[..., None])[..., 0]


OLD = (logprobs(HIDDEN, WEIGHT) + 0.4 * normal(B, T, seed=7)).float()
REF = logprobs(REF_HIDDEN, REF_WEIGHT).float()


def expected(
    hidden, weight, bias, *, kind, beta=0.0, length=None, delta=None, temperature=1.0,
    old=None, ref=None, ratios=None, low=0.2, high=0.2, items=None,
):  # fmt: skip
    """The loss, its KL and clip fraction, in float64."""
    logprob = logprobs(hidden, weight, bias, temperature)
    ratio = (logprob - (logprob.detach() if old is None else old)).exp()
    advantages = ADVANTAGES[:, None].double()
    bounded = ratio if delta is None else ratio.clamp(max=delta)
    per_token = -torch.minimum(bounded * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    if ratios is not None:
        per_token = per_token * ratios
    d = torch.zeros_like(logprob) if ref is None else ref.double() - logprob
    kl = d.exp() - d - 1
    per_token = torch.where(MASK > 0, per_token + beta * kl, 0.0)
    clipped = ((ratio < 1 - low) & (advantages < 0)) | ((ratio > 1 + high) & (advantages > 0))
    n = MASK.sum()
    if kind == "grpo":
        loss = (per_token.sum(1) / MASK.sum(1).clamp(min=1)).sum() / B
    elif kind == "bnpo":
        loss = per_token.sum() / n
    elif kind == "dr_grpo":
        loss = per_token.sum() / (B * length)
    else:
        loss = per_token.sum() / (n if items is None else items)
    return loss, (kl * MASK).sum() / n, (clipped * MASK).sum() / n


def check(options, given, **formula):
    """Two steps' worth: a second batch, of other hidden states, by the same module."""
    module = LigerFusedLinearGRPOLoss(**options)
    for hidden in (HIDDEN, HIDDEN * 0.5):
        ours = [t.clone().requires_grad_() for t in (hidden, WEIGHT, BIAS)]
        exact = [t.double().requires_grad_() for t in (hidden, WEIGHT, BIAS)]
        loss, metrics = module(ours[0], ours[1], IDS, MASK, ADVANTAGES, ours[2], **given)
        right, kl, clipped = expected(*exact, **formula)
        loss.backward()
        right.backward()
        torch.testing.assert_close(loss.double(), right, rtol=1e-5, atol=1e-6)
        of_metrics = [clipped] if module.beta == 0 else [kl, clipped]
        torch.testing.assert_close(
            [m.double() for m in metrics],
            [m.double().detach() for m in of_metrics],
            rtol=1e-5,
            atol=1e-6,
        )
        for one, other in zip(ours, exact):
            assert other.grad.abs().max() > 1e-3
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-6)


KINDS = [
    ("grpo", {}),
    ("bnpo", {}),
    ("dr_grpo", {"max_completion_length": 9}),
    ("dapo", {}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=[kind for kind, _ in KINDS])
@pytest.mark.parametrize("with_old", [False, True], ids=["first update", "later"])
def test_every_loss_type_with_a_kl(kind, options, with_old):
    given = {"ref_per_token_logps": REF} | ({"old_per_token_logps": OLD} if with_old else {})
    check(
        {"loss_type": kind, "beta": 0.3, **options},
        given,
        kind=kind,
        beta=0.3,
        ref=REF,
        old=OLD if with_old else None,
        length=9,
    )


def test_a_reference_of_hidden_states():
    check(
        {"loss_type": "grpo", "beta": 0.3, "temperature": 0.7},
        {"ref_input": REF_HIDDEN, "ref_weight": REF_WEIGHT.requires_grad_(), "ref_bias": BIAS},
        kind="grpo",
        beta=0.3,
        temperature=0.7,
        ref=logprobs(REF_HIDDEN, REF_WEIGHT.detach(), BIAS, 0.7).detach(),
    )


def test_without_a_reference_the_kl_is_0():
    check({"loss_type": "bnpo", "use_ref_model": False}, {}, kind="bnpo")


@pytest.mark.parametrize("shape", [(B,), (B, 1), (B, T)])
def test_ratios_of_another_engine(shape):
    ratios = normal(*shape).abs() + 0.1
    check(
        {"beta": 0.0},
        {"vllm_is_ratio": ratios, "old_per_token_logps": OLD},
        kind="dapo",
        old=OLD,
        ratios=ratios.view(B, -1).double(),
    )


def test_a_bound_above_the_clip():
    far = (OLD - 0.8).float()
    check(
        {"beta": 0.0, "delta": 1.5, "epsilon_low": 0.1, "epsilon_high": 0.3},
        {"old_per_token_logps": far},
        kind="dapo",
        old=far,
        delta=1.5,
        low=0.1,
        high=0.3,
    )


@pytest.mark.parametrize("items", [40, torch.tensor(40)])
def test_the_tokens_of_all_micro_batches(items):
    check({"beta": 0.0}, {"num_items_in_batch": items}, kind="dapo", items=40)


def test_masked_positions_reach_nothing():
    spoilt = torch.where(MASK[..., None] > 0, HIDDEN, torch.nan).requires_grad_()
    old = torch.where(MASK > 0, OLD, torch.nan)
    loss, (clipped,) = LigerFusedLinearGRPOLoss(beta=0.0)(
        spoilt, WEIGHT, IDS, MASK.bool(), ADVANTAGES, old_per_token_logps=old
    )
    loss.backward()
    assert loss.isfinite()
    assert clipped.isfinite()
    assert spoilt.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["grpo", "bnpo", "dapo"])
def test_without_a_token_there_is_no_loss(kind):
    hidden = HIDDEN.clone().requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(beta=0.0, loss_type=kind)(
        hidden, WEIGHT, IDS, torch.zeros(B, T), ADVANTAGES
    )
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"loss_type": kind}, "'grpo', 'bnpo', 'dr_grpo', 'dapo'") for kind in (
            "cispo", "sapo", "vespo", "luspo", "ppo")),
        ({"importance_sampling_level": "sequence"}, "accepted: 'token'"),
        ({"importance_sampling_level": "word"}, "token"),
        ({"loss_type": "dr_grpo"}, "max_completion_length is None"),
        ({"loss_type": "dr_grpo", "max_completion_length": 0}, "max_completion_length"),
        ({"delta": 1.1}, "accepted: from that on"),
        ({"use_bias_correction_kl": True}, "accepted: False"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


def test_a_missing_reference_is_named():
    with pytest.raises(ValueError, match="pass ref_per_token_logps, or ref_input and ref_weight"):
        LigerFusedLinearGRPOLoss()(HIDDEN, WEIGHT, IDS, MASK, ADVANTAGES)
    with pytest.raises(ValueError, match="use_ref_model is True"):
        LigerFusedLinearGRPOLoss()(HIDDEN, WEIGHT, IDS, MASK, ADVANTAGES, ref_input=REF_HIDDEN)


def test_the_example():
    ran = doctest.testmod(liger)
    assert ran.attempted > 0
    assert ran.failed == 0
