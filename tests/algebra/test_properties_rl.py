"""Properties of rewards, advantages, losses and controllers that hold for all inputs."""

import math

import pytest
import torch
from hostile_rows import BACKENDS, TOLERANCE, generators, hostile
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_kernels
from kl_kernels.rl.losses import AGGREGATIONS, aggregate

examples = settings(max_examples=100)
masks = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12).map(
    lambda columns: torch.tensor(columns).T.contiguous()  # [2, T]
)
on_all_backends = pytest.mark.parametrize("backend", BACKENDS)
# Tolerances of the backends' sums of numbers of about 1.
CLOSE = {"reference": 1e-12, "cpu": 1e-5}
DTYPE = {"reference": torch.float64, "cpu": torch.float32}


def per_token(mask, g, n, dtype=torch.float64):
    return torch.randn(n, *mask.shape, generator=g, dtype=torch.float64).to(dtype)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


@examples
@given(masks, generators, st.floats(0, 2), st.sampled_from(["last_token", "after_last"]))
def test_rewards_add_up_to_the_score_less_the_kl(mask, g, kl_coef, position):
    (kl,), scores = per_token(mask, g, 1), torch.randn(2, generator=g, dtype=torch.float64)
    rewards = kl_kernels.compute_rewards(scores, kl, mask, kl_coef, score_position=position)
    expected = torch.where(mask.any(1), scores, 0.0) - kl_coef * torch.where(mask, kl, 0.0).sum(1)
    close(rewards.sum(1), expected)


@on_all_backends
@examples
@given(
    hostile(kinds=("random", "steep", "peaked", "flat", "equal", "near")),
    st.lists(st.booleans(), min_size=4, max_size=4),
    generators,
    st.sampled_from(["k1", "exact"]),
    st.sampled_from([None, 0.5]),
)
def test_fused_rewards_are_those_of_the_kl_that_is_fused(
    backend, rows, mask, g, estimator, kl_clip
):
    rows, mask, scores = rows.on(backend), torch.tensor(mask).view(2, 2), torch.randn(2)
    fused = kl_kernels.kl_rewards(
        *rows, scores, mask, kl_coef=0.3, kl_estimator=estimator, kl_clip=kl_clip, backend=backend
    )
    alone = kl_kernels.token_kl(*rows, mask=mask, backend=backend)
    k1 = alone.logprob - alone.ref_logprob
    kl = k1 if estimator == "k1" else alone.kl
    expected = kl_kernels.compute_rewards(scores, kl, mask, 0.3, kl_clip=kl_clip)
    size = TOLERANCE[backend] * (1 + kl.double().abs())
    assert ((fused.rewards - expected).double().abs() <= size).all()
    for name in ("logprob", "ref_logprob", "kl", "entropy"):
        close(getattr(fused, name), getattr(alone, name), TOLERANCE[backend])


@on_all_backends
@examples
@given(masks, generators, st.floats(0, 1))
def test_with_lambda_one_values_telescope_out_of_the_returns(backend, mask, g, gamma):
    rewards, values = per_token(mask, g, 2, DTYPE[backend])
    advantages, returns = kl_kernels.compute_gae(
        rewards, values, mask, gamma=gamma, lam=1.0, backend=backend
    )
    for i, row in enumerate(mask):
        to_go = 0.0
        for t in reversed(row.nonzero().flatten().tolist()):
            to_go = rewards[i, t].item() + gamma * to_go
            assert returns[i, t].item() == pytest.approx(to_go, rel=1e-5, abs=CLOSE[backend])
            left = to_go - values[i, t].item()
            assert advantages[i, t].item() == pytest.approx(left, rel=1e-5, abs=CLOSE[backend])


@on_all_backends
@examples
@given(masks, generators, st.floats(0, 1), st.floats(0, 1), st.floats(-3, 3))
def test_advantages_are_linear_in_rewards_and_values(backend, mask, g, gamma, lam, factor):
    r, v, r_, v_ = per_token(mask, g, 4, DTYPE[backend])

    def gae(rewards, values):
        return kl_kernels.compute_gae(rewards, values, mask, gamma=gamma, lam=lam, backend=backend)[
            0
        ]

    close(
        gae(r + factor * r_, v + factor * v_), gae(r, v) + factor * gae(r_, v_), 3 * CLOSE[backend]
    )


@on_all_backends
@examples
@given(masks, generators, st.integers(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_holes_in_a_response_are_as_if_cut_out(backend, mask, g, hole, gamma, lam):
    """Any number of masked tokens, full of NaN, after every token."""
    rewards, values = per_token(mask, g, 2, DTYPE[backend])

    def stretched(x, filler):
        wide = torch.full((*x.shape, 1 + hole), filler, dtype=x.dtype)
        wide[..., 0] = x
        return wide.flatten(1)

    options = {"gamma": gamma, "lam": lam, "backend": backend}
    dense = kl_kernels.compute_gae(rewards, values, mask, **options)
    sparse = kl_kernels.compute_gae(
        stretched(rewards, math.nan), stretched(values, math.nan), stretched(mask, False), **options
    )
    for found, expected in zip(sparse, dense):
        close(found, stretched(expected, 0.0), CLOSE[backend])


@examples
@given(masks.filter(lambda m: m.sum() >= 2), generators, st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_whitened_values_have_mean_zero_and_variance_one(mask, g, offset, scale):
    (x,) = per_token(mask, g, 1)
    whitened = kl_kernels.masked_whiten(offset + scale * x, mask, eps=0.0)
    assert whitened[mask].mean().abs() < 1e-7
    assert (whitened[mask].var() - 1).abs() < 1e-7
    assert (whitened[~mask] == 0).all()


CONTROLLERS = {
    "adaptive": lambda **options: kl_kernels.AdaptiveKLController(
        0.1, 6.0, 1000.0, unit="sequence_sum", **options
    ),
    "threshold": lambda **options: kl_kernels.ThresholdKLController(
        0.1, 6.0, unit="sequence_sum", **options
    ),
    "pi": lambda **options: kl_kernels.PIKLController(0.1, 6.0, unit="sequence_sum", **options),
}
kls = st.floats(-8, 20) | st.floats(0, 1e6) | st.sampled_from([0.0, 6.0, math.inf, math.nan])


@pytest.mark.parametrize("name", CONTROLLERS)
@examples
@given(st.lists(kls, max_size=30), kls, kls)
def test_controllers_stay_in_bounds_and_push_harder_against_more_kl(name, history, kl, other):
    low, high = sorted(x if math.isfinite(x) else 0.0 for x in (kl, other))
    values = []
    for last in (low, high):
        controller = CONTROLLERS[name](min_coef=0.02, max_coef=0.9)
        for seen in [*history, last]:
            controller.update(seen, 64)
            assert 0.02 <= controller.value <= 0.9
        values.append(controller.value)
    assert values[0] <= values[1]


@pytest.mark.parametrize("name", CONTROLLERS)
@examples
@given(st.lists(st.floats(-5, 100), min_size=1, max_size=30))
def test_controllers_rest_at_the_target_and_move_away_from_it(name, history):
    controller = CONTROLLERS[name]()
    for kl in [*history, 6.0]:
        controller.update(kl, 64)
    settled = controller.value
    assert controller.update(6.0, 64).error == 0
    assert controller.value == pytest.approx(settled, rel=1e-12)
    above, below = CONTROLLERS[name](), CONTROLLERS[name]()
    assert above.update(60.0, 64).value > 0.1 > below.update(0.6, 64).value


@examples
@given(
    masks,
    generators,
    st.sampled_from(["truncate", "mask"]),
    st.sampled_from(["token", "sequence", "geometric"]),
    st.floats(0, 1),
    st.floats(1, 10),
)
def test_importance_weights_keep_their_bounds(mask, g, mode, level, low, high):
    logprobs, rollout = -10 * per_token(mask, g, 2).abs()
    options = {"mode": mode, "level": level, "low": low, "high": high}
    weights, _ = kl_kernels.importance_weights(logprobs, rollout, mask, **options)
    inside = (weights >= low) & (weights <= high)
    allowed = inside if mode == "truncate" else inside | (weights == 0)
    assert allowed[mask].all()
    assert (weights[~mask] == 0).all()
    same, _ = kl_kernels.importance_weights(logprobs, logprobs, mask, **options)
    assert torch.equal(same, mask.double())


@pytest.mark.parametrize("mode", AGGREGATIONS)
@examples
@given(masks, generators, st.none() | st.floats(0.5, 20))
def test_aggregated_losses_are_those_of_a_loop(mode, mask, g, denominator):
    (loss,) = per_token(mask, g, 1)
    sequences = [row[on].tolist() for row, on in zip(loss, mask) if on.any()]
    count = len(sequences) if mode != "token-mean" else sum(map(len, sequences))
    per_sequence = {
        "token-mean": sum,
        "seq-mean-token-sum": sum,
        "seq-mean-token-mean": lambda tokens: sum(tokens) / len(tokens),
        "seq-mean-token-sum-norm": lambda tokens: sum(tokens) / mask.shape[1],
    }[mode]
    expected = sum(map(per_sequence, sequences)) / (denominator or max(count, 1))
    found = aggregate(loss.masked_fill(~mask, math.nan), mask, mode, denominator)
    assert found.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


@examples
@given(masks, generators)
def test_k3_and_k2_are_never_negative_and_k1_changes_sign_with_the_models(mask, g):
    p, q = 30 * per_token(mask, g, 2)
    for estimator in ("k2", "k3", "abs"):
        assert (kl_kernels.kl_penalty(p, q, estimator) >= 0).all()
    close(kl_kernels.kl_penalty(p, q, "k1"), -kl_kernels.kl_penalty(q, p, "k1"))
