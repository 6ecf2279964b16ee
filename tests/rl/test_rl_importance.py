"""Importance weights: expectations they correct, by enumeration, and the bounds that bias them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import importance_weights

MASK = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])


def pair(seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    rollout = -torch.rand(3, 4, generator=g, dtype=torch.float64) * 3
    return rollout + spread * torch.randn(3, 4, generator=g, dtype=torch.float64), rollout


def by_loop(logprobs, rollout, mask, mode, level, low, high):
    weights = torch.zeros(mask.shape, dtype=torch.float64)
    for i, row in enumerate(mask.tolist()):
        at = [j for j, on in enumerate(row) if on]
        logs = {j: (logprobs[i, j] - rollout[i, j]).item() for j in at}
        for j in at:
            w = {
                "token": lambda j=j, logs=logs: math.exp(logs[j]),
                "sequence": lambda j=j, logs=logs: math.exp(sum(logs.values())),
                "geometric": lambda j=j, logs=logs: math.exp(sum(logs.values()) / len(logs)),
            }[level]()
            inside = low <= w <= high
            weights[i, j] = (min(max(w, low), high) if mode == "truncate" else w) * (
                inside or mode == "truncate"
            )
    return weights


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.sampled_from(["truncate", "mask"]),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.floats(0, 1),
    st.floats(1, 5),
)
def test_weights_are_those_of_a_plain_loop(seed, mode, level, low, high):
    logprobs, rollout = pair(seed)
    weights, metrics = importance_weights(
        logprobs, rollout, MASK, mode=mode, level=level, low=low, high=high
    )
    expected = by_loop(logprobs, rollout, MASK, mode, level, low, high)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    free = by_loop(logprobs, rollout, MASK, "truncate", level, 0.0, math.inf)[MASK.bool()]
    outside = (free < low) | (free > high)
    assert metrics["weight_mean"].item() == pytest.approx(free.mean().item(), rel=1e-12)
    assert metrics["weight_max"].item() == pytest.approx(free.max().item(), rel=1e-12)
    assert metrics["bounded_fraction"].item() == pytest.approx(outside.double().mean().item())


def test_published_bounds_are_the_defaults():
    w = torch.tensor([[0.1, 0.49, 0.51, 1.9, 2.1, 4.9, 5.1, 100.0]], dtype=torch.float64)
    expected = {
        "truncate": [0.1, 0.49, 0.51, 1.9, 2.0, 2.0, 2.0, 2.0],
        "mask": [0.0, 0.0, 0.51, 1.9, 2.1, 4.9, 0.0, 0.0],
    }
    for mode, weights in expected.items():
        found, metrics = importance_weights(w.log(), torch.zeros(1, 8), torch.ones(1, 8), mode=mode)
        assert found[0].tolist() == pytest.approx(weights, rel=1e-6)
        assert metrics["bounded_fraction"] == 0.5


def test_unbounded_weights_make_the_engine_s_expectation_the_policy_s():
    """E over the engine of w f = E over the policy of f, over all tokens of a small vocabulary."""
    torch.manual_seed(0)
    policy, engine = torch.randn(2, 1, 7, dtype=torch.float64).log_softmax(-1)
    f = torch.randn(1, 7, dtype=torch.float64)
    weights, metrics = importance_weights(policy, engine, torch.ones(1, 7), high=math.inf)
    assert (engine.exp() * weights * f).sum().item() == pytest.approx(
        (policy.exp() * f).sum().item(), rel=1e-12
    )


def test_k1_and_k3_estimate_the_kl_of_engine_and_policy():
    torch.manual_seed(0)
    policy, engine = torch.randn(2, 7, dtype=torch.float64).log_softmax(-1)
    kl = (engine.exp() * (engine - policy)).sum().item()
    for name in ("k1", "k3"):
        estimates = [
            importance_weights(p.view(1, 1), e.view(1, 1), torch.ones(1, 1))[1][name].item()
            for p, e in zip(policy, engine)
        ]
        expected = sum(e.exp().item() * k for e, k in zip(engine, estimates))
        assert expected == pytest.approx(kl, rel=1e-12)


def test_equal_engines_weigh_1_and_masked_nan_reaches_nothing():
    logprobs, _ = pair()
    broken = torch.where(MASK.bool(), logprobs, torch.nan)
    for level in ("token", "sequence", "geometric"):
        weights, metrics = importance_weights(broken, broken, MASK, level=level)
        assert torch.equal(weights, MASK.double())
        assert metrics["bounded_fraction"] == 0
        assert metrics["k1"] == metrics["k3"] == 0


@pytest.mark.parametrize("side", ["engine", "trainer", "both"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_an_unknown_log_probability_has_weight_0_in_both_modes(level, mode, side):
    """Levels of sequences give its whole sequence weight 0; metrics leave out the unknown."""
    logprobs, rollout = pair(spread=0.3)
    expected, _ = importance_weights(logprobs, rollout, MASK, mode=mode, level=level)
    for name, tensor in (("engine", rollout), ("trainer", logprobs)):
        if side in (name, "both"):
            tensor[0, 1] = math.nan
    weights, metrics = importance_weights(logprobs, rollout, MASK, mode=mode, level=level)
    unknown = torch.zeros(3, 4, dtype=torch.bool)
    unknown[0, 1 if level == "token" else slice(None)] = True
    assert torch.equal(weights, expected.masked_fill(unknown, 0.0))

    known, known_token = MASK.clone(), MASK.clone()
    known[unknown], known_token[0, 1] = 0, 0
    _, of_known = importance_weights(logprobs, rollout, known, mode=mode, level=level)
    _, of_tokens = importance_weights(logprobs, rollout, known_token, mode=mode)
    n, n_known = MASK.sum(), known.sum()
    outside = of_known["bounded_fraction"] * n_known + (n - n_known)
    torch.testing.assert_close(metrics["bounded_fraction"], outside / n)
    for name in ("weight_mean", "weight_max"):
        assert torch.equal(metrics[name], of_known[name])
    for name in ("k1", "k3"):
        assert torch.equal(metrics[name], of_tokens[name])
    assert all(value.isfinite() for value in metrics.values())


def test_a_rollout_without_any_log_probability_trains_on_nothing_and_says_so():
    logprobs, rollout = pair()
    weights, metrics = importance_weights(logprobs, rollout * math.nan, MASK)
    assert not weights.any()
    assert metrics.pop("bounded_fraction") == 1
    assert all(value == 0 for value in metrics.values())


def test_weights_are_constants():
    logprobs, rollout = pair()
    weights, metrics = importance_weights(logprobs.requires_grad_(), rollout, MASK)
    assert not weights.requires_grad
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "clip"}, "mode is 'clip'; accepted: 'truncate', 'mask'"),
        ({"level": "batch"}, "level is 'batch'"),
        ({"low": -1.0}, "low is -1"),
        ({"low": 3.0}, "high is 2.0; it must be at least low, 3.0"),
        ({"high": math.nan}, "high is nan"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        importance_weights(*pair(), MASK, **options)


def test_bounds_belong_to_what_they_bound():
    logprobs = torch.tensor([[0.5, 2.0, 1.0]], dtype=torch.float64).log()
    ratios = logprobs.exp()
    found, metrics = importance_weights(
        logprobs,
        torch.zeros_like(logprobs),
        torch.ones(1, 3),
        mode="mask",
        low=ratios[0, 0].item(),
        high=ratios[0, 1].item(),
    )
    assert torch.equal(found, ratios)
    assert metrics["bounded_fraction"] == 0


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_low_precision_is_computed_in_float32(level):
    pairs = [tensor.bfloat16() for tensor in pair()]
    found, metrics = importance_weights(*pairs, MASK, level=level)
    expected, expected_metrics = importance_weights(*(t.float() for t in pairs), MASK, level=level)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert metrics == expected_metrics


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_a_batch_without_positions_has_no_weights(shape):
    nothing = torch.zeros(shape)
    weights, metrics = importance_weights(nothing, nothing, nothing)
    assert weights.shape == shape
    assert all(value == 0 for value in metrics.values())
