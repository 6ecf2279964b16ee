"""The reward epilogue of every backend, token by token in Python, from eager log-probabilities."""

import math

import pytest
import torch

import kl_kernels

BACKENDS = ("reference", "cpu", "triton")
V, T = 29, 6

# Whole, cut at both ends, with a hole (tool output), one token, and empty.
MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
SCORES = torch.tensor([1.5, -2.0, 0.25, 7.0, 100.0])
ESTIMATORS = {
    "k1": lambda d, kl: d,
    "exact": lambda d, kl: kl,
    "k2": lambda d, kl: d * d / 2,
    "k3": lambda d, kl: math.exp(-d) - 1 + d,
    "abs": lambda d, kl: abs(d),
}
POSITIONS = {
    "last_token": [5, 3, 4, 2, None],
    "after_last": [5, 4, 5, 3, None],
    "index": [0, 5, -1, 1, 2],
}


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(5, T, V, generator=g)
    ref_logits = 2 * torch.randn(5, T, V, generator=g)
    return logits, ref_logits, torch.randint(V, (5, T), generator=g)


def expected(inputs, estimator, kl_coef, kl_clip, score_clip, positions):
    """Rewards and corrections by the definition, in Python floats."""
    log_p, log_q = (t.double().log_softmax(-1) for t in inputs[:2])
    rewards = torch.zeros(5, T, dtype=torch.float64)
    corrections = torch.zeros(5, T, dtype=torch.float64)

    def clip(value, limit):
        return value if limit is None else max(-limit, min(limit, value))

    for b in range(5):
        for t in range(T):
            if not MASK[b, t]:
                continue
            p, q, token = log_p[b, t], log_q[b, t], inputs[2][b, t]
            exact = float((p.exp() * (p - q)).sum())
            k1 = float(p[token] - q[token])
            estimate = clip(ESTIMATORS[estimator](k1, exact), kl_clip)
            rewards[b, t] = -kl_coef * estimate
            if estimator == "exact":
                corrections[b, t] = -kl_coef * (clip(k1, kl_clip) - estimate)
        position = positions[b]
        if MASK[b].any() and position is not None and position >= 0:
            rewards[b, position] += clip(float(SCORES[b]), score_clip)
    return rewards, corrections


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kl_clip", [None, 0.5])
def test_estimators(backend, estimator, kl_clip, inputs):
    result = kl_kernels.kl_rewards(
        *inputs,
        SCORES,
        MASK,
        kl_coef=0.3,
        kl_estimator=estimator,
        kl_clip=kl_clip,
        biased=True,
        backend=backend,
    )
    rewards, corrections = expected(inputs, estimator, 0.3, kl_clip, None, POSITIONS["last_token"])
    torch.testing.assert_close(result.rewards.double(), rewards, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(
        result.advantage_correction.double(), corrections, atol=2e-6, rtol=2e-6
    )
    if kl_clip is not None:  # some KL must be clipped, on both sides where possible
        unclipped, _ = expected(inputs, estimator, 0.3, None, None, POSITIONS["last_token"])
        assert ((unclipped - rewards).abs() > 0.01).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("score_clip", [None, 1.0])
def test_score_positions(backend, position, score_clip, inputs):
    where = torch.tensor(POSITIONS["index"]) if position == "index" else position
    result = kl_kernels.kl_rewards(
        *inputs,
        SCORES,
        MASK,
        kl_coef=0.1,
        score_position=where,
        score_clip=score_clip,
        backend=backend,
    )
    rewards, _ = expected(inputs, "k1", 0.1, None, score_clip, POSITIONS[position])
    torch.testing.assert_close(result.rewards.double(), rewards, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_other_fields_are_those_of_token_kl(backend, inputs):
    rewards = kl_kernels.kl_rewards(
        *inputs, SCORES, MASK, kl_coef=0.1, temperature=0.8, backend=backend
    )
    plain = kl_kernels.token_kl(*inputs, mask=MASK, temperature=0.8, backend=backend)
    for name in ("kl", "logprob", "ref_logprob", "entropy"):
        assert torch.equal(getattr(rewards, name), getattr(plain, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_carry_no_gradient_and_the_rest_that_of_token_kl(backend, inputs):
    logits = inputs[0].clone().requires_grad_()
    result = kl_kernels.kl_rewards(
        logits, *inputs[1:], SCORES, MASK, kl_coef=0.1, kl_estimator="exact", backend=backend
    )
    assert not result.rewards.requires_grad
    assert not result.advantage_correction.requires_grad
    got = torch.autograd.grad((result.kl - result.logprob).sum(), logits)[0]
    plain = kl_kernels.token_kl(logits, *inputs[1:], mask=MASK, backend=backend)
    assert torch.equal(got, torch.autograd.grad((plain.kl - plain.logprob).sum(), logits)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_outside_the_mask_changes_nothing(backend, inputs):
    logits, ref_logits, token_ids = inputs
    clean = kl_kernels.kl_rewards(*inputs, SCORES, MASK, kl_coef=0.1, backend=backend)
    dirty = kl_kernels.kl_rewards(
        logits.masked_fill(~MASK[..., None], torch.nan),
        ref_logits.masked_fill(~MASK[..., None], torch.inf),
        token_ids.masked_fill(~MASK, -1),
        SCORES,
        MASK,
        kl_coef=0.1,
        backend=backend,
    )
    for a, b in zip(clean, dirty):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_sum_to_score_minus_beta_kl(backend, inputs):
    result = kl_kernels.kl_rewards(
        *inputs, SCORES, MASK, kl_coef=0.2, kl_estimator="exact", backend=backend
    )
    scores = torch.where(MASK.any(1), SCORES, 0.0)
    torch.testing.assert_close(
        result.rewards.double().sum(1),
        scores.double() - 0.2 * result.kl.double().sum(1),
        atol=1e-5,
        rtol=0,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_that_is_nan_stays_in_its_sequence(backend, inputs):
    scores = SCORES.clone()
    scores[1] = torch.nan
    result = kl_kernels.kl_rewards(*inputs, scores, MASK, kl_coef=0.2, backend=backend)
    assert result.rewards.isnan().sum() == 1
    assert result.rewards[1, 3].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_a_zero_coefficient_leaves_the_score_alone_even_where_kl_is_infinite(
    backend, estimator, inputs
):
    logits, ref_logits, token_ids = inputs
    ref_logits[0, 0, token_ids[0, 0]] = -torch.inf
    result = kl_kernels.kl_rewards(
        logits,
        ref_logits,
        token_ids,
        SCORES,
        MASK,
        kl_coef=0.0,
        kl_estimator=estimator,
        backend=backend,
    )
    assert result.kl[0, 0] == torch.inf
    expected_rewards = torch.zeros(5, T)
    for b, position in enumerate(POSITIONS["last_token"][:4]):
        expected_rewards[b, position] = SCORES[b]
    assert torch.equal(result.rewards, expected_rewards)
    assert torch.equal(result.advantage_correction, torch.zeros(5, T))
    composed = kl_kernels.compute_rewards(SCORES, result.kl, MASK, 0.0)
    assert torch.equal(composed, expected_rewards)
