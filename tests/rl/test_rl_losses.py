"""PPO's losses token by token against plain Python, float64, and their gradients in closed form."""

import math

import pytest
import torch

from kl_kernels import ppo_policy_loss, ppo_value_loss
from kl_kernels.algebra.epilogues import (
    EXACT,
    PolicyLossInputs,
    PolicyLossParams,
    policy_loss_epilogue,
)
from kl_kernels.algebra.row import Finished
from kl_kernels.rl.losses import AGGREGATIONS, aggregate, token_weights
from kl_kernels.schemas import POLICY_LOSS_TERMS

CLOSE = {"rtol": 1e-13, "atol": 1e-13}
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1],  # full
        [1, 1, 0, 0, 0],  # right-padded
        [0, 1, 1, 0, 1],  # left-padded, with a hole
        [0, 0, 0, 0, 0],  # empty
        [0, 0, 0, 1, 0],  # a single token
    ]
)
KEEP = MASK.bool()
BOTH = ("policy", "value")


def normal(*shape, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def arguments(kind):
    """Tensors far enough apart that some tokens are clipped on either side."""
    first, second, third = normal(3, *MASK.shape, seed=1)
    if kind == "policy":
        return [first, first + 0.4 * second, third]  # logprobs, old_logprobs, advantages
    return [first, first + 0.4 * second, third]  # values, old_values, returns


def loss_of(kind):
    return ppo_policy_loss if kind == "policy" else ppo_value_loss


def aggregated(losses, mask, mode, denominator=None):
    """Per-token losses as one number, by loops."""
    rows = [[x for x, m in zip(r, k) if m] for r, k in zip(losses.tolist(), mask.tolist())]
    rows = [row for row in rows if row]
    if mode == "token-mean":
        return sum(map(sum, rows)) / (denominator or sum(map(len, rows)))
    of_sequence = {
        "seq-mean-token-sum": sum,
        "seq-mean-token-mean": lambda row: sum(row) / len(row),
        "seq-mean-token-sum-norm": lambda row: sum(row) / mask.shape[1],
    }[mode]
    return sum(map(of_sequence, rows)) / (denominator or len(rows))


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 17, 3.5, torch.tensor(17)])
def test_aggregation_is_that_of_the_loops(mode, denominator):
    losses = normal(*MASK.shape, seed=0)
    number = float(denominator) if denominator is not None else None
    result = aggregate(losses, MASK, mode, denominator)
    assert float(result) == pytest.approx(aggregated(losses, MASK, mode, number), rel=1e-13)
    assert torch.equal(result, aggregate(losses, MASK * 1.0, mode, denominator))


def test_tokens_count_alike_unless_told_otherwise():
    losses = normal(*MASK.shape, seed=0)
    assert torch.equal(aggregate(losses, MASK), aggregate(losses, MASK, "token-mean"))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_single_token_has_all_the_weight(mode):
    assert token_weights(torch.ones(1, 1), mode).item() == 1


def test_aggregations_differ():
    losses = normal(*MASK.shape, seed=0)
    results = {round(float(aggregate(losses, MASK, mode)), 6) for mode in AGGREGATIONS}
    assert len(results) == len(AGGREGATIONS)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_token_weights_are_the_gradient_of_the_aggregate(mode):
    losses = normal(*MASK.shape, seed=0).requires_grad_()
    grad = torch.autograd.grad(aggregate(losses, MASK, mode, 5), losses)[0]
    weights = token_weights(MASK, mode, 5, dtype=torch.float64)
    assert torch.equal(grad, weights)
    assert (weights[~KEEP] == 0).all()


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_nothing_unmasked_is_a_loss_of_zero(mode, shape):
    losses = torch.full(shape, torch.nan, requires_grad=True)
    result = aggregate(losses, torch.zeros(shape), mode)
    assert result.item() == 0
    assert (torch.autograd.grad(result, losses)[0] == 0).all()


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_micro_batches_add_up_to_the_whole(kind, mode, as_tensor):
    loss_fn, (x, *rest) = loss_of(kind), arguments(kind)
    count = int(KEEP.sum() if mode == "token-mean" else KEEP.any(1).sum())
    denominator = torch.tensor(count) if as_tensor else count

    def loss_and_grad(parts, denominator):
        leaf = x.clone().requires_grad_()
        loss = sum(
            loss_fn(
                leaf[p], *(t[p] for t in rest), MASK[p], aggregation=mode, denominator=denominator
            )[0]
            for p in parts
        )
        return loss, torch.autograd.grad(loss, leaf)[0]

    whole = loss_and_grad([slice(None)], None)
    parts = [slice(0, 1), slice(1, 3), slice(3, 5)]
    for w, p in zip(whole, loss_and_grad(parts, denominator)):
        torch.testing.assert_close(p, w, **CLOSE)
    averaged = loss_and_grad(parts, None)[0] / len(parts)
    assert abs(averaged - whole[0]) > 1e-3  # the mean of micro-batch means differs


# One token each: advantage, log ratio, and with clip 0.2 / 0.3 and dual clip 3 the loss and its
# gradient with respect to the log-probability.
TOKENS = {
    "good_inside": (2.0, 0.1, -2 * math.exp(0.1), -2 * math.exp(0.1)),
    "good_above": (2.0, 0.5, -2 * 1.3, 0.0),
    "good_far_above": (2.0, 60.0, -2 * 1.3, 0.0),
    "good_below": (2.0, -0.5, -2 * math.exp(-0.5), -2 * math.exp(-0.5)),
    "bad_inside": (-2.0, 0.1, 2 * math.exp(0.1), 2 * math.exp(0.1)),
    "bad_above": (-2.0, 0.5, 2 * math.exp(0.5), 2 * math.exp(0.5)),
    "bad_far_above": (-2.0, 1.5, 2 * 3.0, 0.0),
    "bad_below": (-2.0, -0.5, 2 * 0.8, 0.0),
    "neutral": (0.0, 0.5, 0.0, 0.0),
}
OPTIONS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 3.0}


@pytest.mark.parametrize(("advantage", "log_ratio", "loss", "grad"), TOKENS.values(), ids=TOKENS)
def test_each_case_of_the_clipped_loss(advantage, log_ratio, loss, grad):
    old = torch.tensor([[-1.3]], dtype=torch.float64)
    logprobs = (old + log_ratio).requires_grad_()
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    result, metrics = ppo_policy_loss(logprobs, old, advantages, torch.ones(1, 1), **OPTIONS)
    assert float(result.detach()) == pytest.approx(loss, rel=1e-13, abs=1e-15)
    actual = torch.autograd.grad(result, logprobs)[0]
    assert actual.item() == pytest.approx(grad, rel=1e-13, abs=1e-15)
    clipped = advantage != 0 and grad == 0
    assert metrics["clip_fraction"] + metrics["clip_fraction_dual"] == clipped


def test_a_dual_clip_that_the_loss_just_reaches_leaves_its_gradient():
    """A ratio that equals dual_clip to the bit, in the loss alone and in the fused formula."""
    one = torch.ones(1, 1, dtype=torch.float64)
    log_ratio = 1.5 * one
    ratio = log_ratio.exp()
    logprobs = log_ratio.clone().requires_grad_()
    loss, metrics = ppo_policy_loss(logprobs, 0 * one, -one, one, dual_clip=ratio.item())
    assert torch.autograd.grad(loss, logprobs)[0] == ratio
    assert metrics["clip_fraction_dual"] == 0
    terms, upstream = policy_loss_epilogue(
        Finished(log_ratio, *4 * (0 * one,)),
        PolicyLossInputs(0 * one, -one, one, one, 0 * one),
        PolicyLossParams(0.2, 0.2, ratio.item(), None, 0.0, EXACT, 0.0),
    )
    assert upstream.logprob == ratio
    assert terms[POLICY_LOSS_TERMS.index("clip_fraction_dual")] == 0


def formula(logprobs, old, advantages, weights=None, clip_low=0.2, clip_high=0.2, dual_clip=None):
    """The policy loss of each token and which clip decides, in Python's own arithmetic."""
    losses, clips, duals = (torch.zeros_like(logprobs) for _ in range(3))
    for i in range(logprobs.numel()):
        a = advantages.view(-1)[i].item()
        ratio = math.exp(logprobs.view(-1)[i].item() - old.view(-1)[i].item())
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        loss = max(-a * ratio, -a * bounded)
        clips.view(-1)[i] = -a * bounded > -a * ratio
        if dual_clip is not None and a < 0 and loss > -a * dual_clip:
            duals.view(-1)[i] = 1
            loss = -a * dual_clip
        losses.view(-1)[i] = loss * (1 if weights is None else weights.view(-1)[i].item())
    return losses, clips, duals


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize(
    "options", [{}, {"clip_high": 0.28}, {"dual_clip": 1.5}, {"clip_low": 0.0, "clip_high": 0.0}]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_policy_loss_and_metrics_are_those_of_the_formula(mode, options, weighted):
    logprobs, old, advantages = arguments("policy")
    weights = normal(*MASK.shape, seed=9).exp() if weighted else None
    loss, metrics = ppo_policy_loss(
        logprobs, old, advantages, MASK, weights=weights, aggregation=mode, **options
    )
    losses, clips, duals = formula(logprobs, old, advantages, weights, **options)
    assert float(loss) == pytest.approx(aggregated(losses, MASK, mode), rel=1e-13)
    log_ratio = (logprobs - old)[KEEP]
    expected = {
        "clip_fraction": clips[KEEP].mean(),
        "clip_fraction_dual": duals[KEEP].mean(),
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
        "approx_kl_k1": -log_ratio.mean(),
        "ratio_mean": log_ratio.exp().mean(),
        "ratio_max": log_ratio.exp().max(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=name, **CLOSE)
        assert metrics[name].ndim == 0
        assert not metrics[name].requires_grad
    assert metrics["clip_fraction"] > 0


def test_the_first_step_is_the_plain_policy_gradient():
    logprobs, _, advantages = arguments("policy")
    leaf = logprobs.clone().requires_grad_()
    loss, metrics = ppo_policy_loss(leaf, logprobs, advantages, MASK)
    grad = torch.autograd.grad(loss, leaf)[0]
    expected = torch.where(KEEP, -advantages / KEEP.sum(), 0.0)
    torch.testing.assert_close(grad, expected, **CLOSE)
    for name, value in (("approx_kl", 0), ("clip_fraction", 0), ("ratio_mean", 1)):
        assert metrics[name] == value


def test_the_log_ratio_clamp_keeps_the_loss_finite_and_the_pull_back_alive():
    old = torch.zeros(1, 3)
    logprobs = torch.tensor([[-200.0, 30.0, 200.0]]).requires_grad_()
    advantages = torch.tensor([[1.0, -1.0, -1.0]])
    loss, metrics = ppo_policy_loss(
        logprobs, old, advantages, torch.ones(1, 3), log_ratio_clamp=5.0, denominator=1
    )
    ratio = torch.tensor([[-5.0, 5.0, 5.0]]).exp()
    grad = torch.autograd.grad(loss, logprobs)[0]
    torch.testing.assert_close(grad, -advantages * ratio, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["ratio_max"], ratio.max(), rtol=1e-6, atol=0)
    default, metrics = ppo_policy_loss(logprobs, old, advantages, torch.ones(1, 3))
    assert default.isfinite()
    assert metrics["ratio_max"].item() == pytest.approx(math.exp(20), rel=1e-6)
    unclamped, _ = ppo_policy_loss(
        logprobs, old, advantages, torch.ones(1, 3), log_ratio_clamp=None
    )
    assert unclamped.isinf()


def value_formula(values, old, returns, clip_range):
    losses, grads, clips = (torch.zeros_like(values) for _ in range(3))
    for i in range(values.numel()):
        v, o, r = (t.view(-1)[i].item() for t in (values, old, returns))
        bounded = v if clip_range is None else min(max(v, o - clip_range), o + clip_range)
        clip = (bounded - r) ** 2 > (v - r) ** 2
        losses.view(-1)[i] = 0.5 * max((v - r) ** 2, (bounded - r) ** 2)
        grads.view(-1)[i] = 0.0 if clip else v - r
        clips.view(-1)[i] = clip
    return losses, grads, clips


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("clip_range", [None, 0.2, 0.5])
def test_value_loss_gradient_and_metrics_are_those_of_the_formula(mode, clip_range):
    values, old, returns = arguments("value")
    leaf = values.clone().requires_grad_()
    loss, metrics = ppo_value_loss(
        leaf, old, returns, MASK, clip_range=clip_range, aggregation=mode
    )
    losses, grads, clips = value_formula(values, old, returns, clip_range)
    assert float(loss.detach()) == pytest.approx(aggregated(losses, MASK, mode), rel=1e-13)
    weights = token_weights(MASK, mode, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0], grads * weights, **CLOSE)
    v, r = values[KEEP], returns[KEEP]
    expected = {
        "clip_fraction": clips[KEEP].mean(),
        "value_mean": v.mean(),
        "return_mean": r.mean(),
        "explained_variance": 1 - (r - v).var() / r.var(),
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=name, **CLOSE)
        assert not metrics[name].requires_grad
    assert (metrics["clip_fraction"] > 0) == (clip_range is not None)


def test_without_clipping_old_values_are_not_needed():
    values, old, returns = arguments("value")
    with_old, _ = ppo_value_loss(values, old, returns, MASK, clip_range=None)
    assert torch.equal(with_old, ppo_value_loss(values, None, returns, MASK, clip_range=None)[0])
    with pytest.raises(ValueError, match="old_values is None"):
        ppo_value_loss(values, None, returns, MASK)


def test_values_are_clipped_at_a_fifth_unless_told_otherwise():
    values, old, returns = arguments("value")
    default, _ = ppo_value_loss(values, old, returns, MASK)
    assert torch.equal(default, ppo_value_loss(values, old, returns, MASK, clip_range=0.2)[0])


def test_returns_that_hardly_vary_are_explained_all_the_same():
    returns = normal(*MASK.shape, seed=3) * 1e-3
    _, metrics = ppo_value_loss(returns, returns, returns, MASK)
    assert metrics["explained_variance"] == 1


def test_returns_that_do_not_vary_leave_nothing_to_explain():
    values = torch.tensor([[1.0, 2.0]])
    _, metrics = ppo_value_loss(values, values, torch.ones(1, 2), torch.ones(1, 2))
    assert metrics["explained_variance"] == 0


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_garbage_reaches_neither_loss_nor_metrics_nor_gradient(kind, mode, garbage):
    loss_fn, clean = loss_of(kind), arguments(kind)
    dirty = [t.masked_fill(~KEEP, garbage) for t in clean]
    extra = {"dual_clip": 1.5} if kind == "policy" else {}
    results = []
    for tensors in (clean, dirty):
        tensors[0].requires_grad_()
        weights = torch.where(KEEP, 0.5, garbage if tensors is dirty else 1.0)
        if kind == "policy":
            extra["weights"] = weights
        with torch.autograd.detect_anomaly(check_nan=True):  # nor any gradient on the way
            loss, metrics = loss_fn(*tensors, MASK, aggregation=mode, **extra)
            grad = torch.autograd.grad(loss, tensors[0])[0]
        assert (grad[~KEEP] == 0).all()
        results.append([loss, grad, *metrics.values()])
    for c, d in zip(*results):
        assert torch.equal(c, d)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_a_batch_without_tokens_has_no_loss(kind, shape):
    leaf = torch.full(shape, torch.nan, requires_grad=True)
    rest = [torch.full(shape, torch.nan)] * 2
    loss, metrics = loss_of(kind)(leaf, *rest, torch.zeros(shape))
    assert (torch.autograd.grad(loss, leaf)[0] == 0).all()
    for value in (loss, *metrics.values()):
        assert value == 0


@pytest.mark.parametrize("kind", BOTH)
def test_only_the_first_argument_gets_a_gradient(kind):
    tensors = [t.requires_grad_() for t in arguments(kind)]
    options = {}
    if kind == "policy":
        options["weights"] = normal(*MASK.shape, seed=9).requires_grad_()
    loss, _ = loss_of(kind)(*tensors, MASK, **options)
    tensors += options.values()
    grads = torch.autograd.grad(loss, tensors, allow_unused=True)
    assert grads[0].abs().max() > 0
    assert set(grads[1:]) == {None}


@pytest.mark.parametrize("kind", BOTH)
def test_low_precision_is_computed_in_float32(kind):
    tensors = [t.bfloat16() for t in arguments(kind)]
    loss, metrics = loss_of(kind)(*tensors, MASK)
    expected, _ = loss_of(kind)(*(t.float() for t in tensors), MASK)
    assert loss.dtype == torch.float32
    assert all(m.dtype == torch.float32 for m in metrics.values())
    assert torch.equal(loss, expected)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("policy", {"clip_low": -0.1}, "clip_low is -0.1"),
        ("policy", {"clip_high": math.nan}, "clip_high is nan"),
        ("policy", {"dual_clip": 1.0}, "dual_clip is 1"),
        ("policy", {"dual_clip": math.inf}, "dual_clip is inf"),
        ("policy", {"log_ratio_clamp": 0.0}, "log_ratio_clamp is 0"),
        ("policy", {"weights": torch.ones(4)}, "weights has shape"),
        ("policy", {"aggregation": "mean"}, "'token-mean'"),
        ("policy", {"denominator": 0}, "denominator is 0"),
        ("value", {"clip_range": 0.0}, "clip_range is 0"),
        ("value", {"aggregation": "mean"}, "'token-mean'"),
        ("value", {"denominator": -3}, "denominator is -3"),
    ],
)
def test_bad_options_are_named(kind, options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(kind)(*arguments(kind), MASK, **options)


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("position", range(4))
def test_shapes_have_to_agree(kind, position):
    tensors = [*arguments(kind), MASK]
    tensors[position] = tensors[position][:, :-1]
    with pytest.raises(ValueError, match="has shape"):
        loss_of(kind)(*tensors)
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        loss_of(kind)(*(t[0] for t in [*arguments(kind), MASK]))
