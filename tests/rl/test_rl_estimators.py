"""`kl_penalty` by exact enumeration: every expectation is a sum over a 7-way categorical, float64.

What each (estimator, gradient) combination is the gradient of stands in `rl/estimators.py`; here it
is checked on-policy and off-policy, against autograd through independent formulas.
"""

import itertools
from typing import get_args

import pytest
import torch
from torch import Tensor

from kl_kernels import kl_penalty
from kl_kernels.rl.estimators import SAMPLED_ESTIMATORS, KLPenalty

N = 7
ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("pathwise", "straight_through", "score_function", "detach")
COMBINATIONS = [c for c in itertools.product(ESTIMATORS, GRADIENTS) if c != ("k1", "pathwise")]
DIFFERENTIABLE = [c for c in COMBINATIONS if c[1] != "detach"]

_g = torch.Generator().manual_seed(7)
POLICY, REFERENCE, OLD = (torch.randn(N, generator=_g, dtype=torch.float64) for _ in range(3))


def log_p(logits: Tensor) -> Tensor:
    return logits.log_softmax(0)


def gradient_of(expectation) -> Tensor:
    """The gradient of expectation(log-probabilities) with respect to the policy's logits."""
    logits = POLICY.clone().requires_grad_()
    return torch.autograd.grad(expectation(log_p(logits)), logits)[0]


def expected_under_policy(f):
    """E[f(d)] as a function of the policy, through its probabilities as well."""
    return lambda lp: (lp.exp() * f(lp - log_p(REFERENCE))).sum()


# Gradients that a combination may have.
TRUTHS = {
    "KL": gradient_of(expected_under_policy(lambda d: d)),
    "forward KL": gradient_of(lambda lp: (log_p(REFERENCE).exp() * (log_p(REFERENCE) - lp)).sum()),
    "E[k2]": gradient_of(expected_under_policy(lambda d: d * d / 2)),
    "E[abs]": gradient_of(expected_under_policy(lambda d: d.abs())),
}
TABLE = {
    ("k2", "pathwise"): "KL",
    ("k3", "pathwise"): "forward KL",
    ("abs", "pathwise"): None,
    **{(estimator, "straight_through"): "KL" for estimator in ESTIMATORS},
    ("k1", "score_function"): "KL",
    ("k2", "score_function"): "E[k2]",
    ("k3", "score_function"): "KL",
    ("abs", "score_function"): "E[abs]",
}


def expected_gradient(sampler: Tensor, **options) -> Tensor:
    """Sum over tokens of the sampler's probability times the gradient of the estimate."""
    probability = log_p(sampler).exp()
    return gradient_of(lambda lp: (probability * kl_penalty(lp, log_p(REFERENCE), **options)).sum())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def sampling(off_policy: bool) -> tuple[Tensor, Tensor | None]:
    return (OLD, log_p(OLD)) if off_policy else (POLICY, None)


def test_truths_are_far_apart():
    for a, b in itertools.permutations(TRUTHS, 2):
        assert relative_error(TRUTHS[a], TRUTHS[b]) > 0.1, (a, b)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize(("estimator", "gradient"), DIFFERENTIABLE)
def test_expected_gradient_is_what_the_table_says(estimator, gradient, off_policy):
    sampler, old = sampling(off_policy)
    actual = expected_gradient(sampler, kl_penalty=estimator, gradient=gradient, old_logprobs=old)
    for name, truth in TRUTHS.items():
        error = relative_error(actual, truth)
        if name == TABLE[estimator, gradient]:
            assert error < 1e-12, name
        else:
            assert error > 0.1, name


@pytest.mark.parametrize(("estimator", "gradient"), DIFFERENTIABLE)
def test_off_policy_tokens_without_old_logprobs_are_biased(estimator, gradient):
    actual = expected_gradient(OLD, kl_penalty=estimator, gradient=gradient)
    assert relative_error(actual, TRUTHS["KL"]) > 0.1


def test_k1_as_a_pathwise_loss_has_no_expected_gradient_and_is_refused():
    for sampler, ratio in ((POLICY, 1.0), (OLD, (log_p(POLICY) - log_p(OLD)).exp())):
        weights = log_p(sampler).exp() * ratio
        k1 = gradient_of(lambda lp, w=weights: (w * (lp - log_p(REFERENCE))).sum())
        assert k1.abs().max() < 1e-15
    logprobs = log_p(POLICY).requires_grad_()
    for name in ("k1", "kl"):
        with pytest.raises(ValueError, match="expected gradient is 0"):
            kl_penalty(logprobs, log_p(REFERENCE), name)
        with pytest.raises(ValueError, match="expected gradient is 0"):
            kl_penalty(logprobs, log_p(REFERENCE), name, old_logprobs=log_p(OLD))
    with torch.no_grad():
        kl_penalty(logprobs, log_p(REFERENCE), "k1")
    assert not kl_penalty(logprobs, log_p(REFERENCE), "k1", gradient="detach").requires_grad
    kl_penalty(logprobs.detach(), log_p(REFERENCE))


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize(("estimator", "gradient"), COMBINATIONS)
def test_values_of_k1_and_k3_are_unbiased_and_of_the_others_are_not(
    estimator, gradient, off_policy
):
    sampler, old = sampling(off_policy)
    estimate = kl_penalty(
        log_p(POLICY), log_p(REFERENCE), estimator, gradient=gradient, old_logprobs=old
    )
    expected = (log_p(sampler).exp() * estimate).sum()
    kl = (log_p(POLICY).exp() * (log_p(POLICY) - log_p(REFERENCE))).sum()
    if estimator in ("k1", "k3"):
        assert abs(expected - kl) < 1e-14
    else:
        assert abs(expected - kl) > 0.05 * kl


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_gradient_mode_does_not_change_the_value(gradient):
    for estimator, old in itertools.product(ESTIMATORS, (None, log_p(OLD))):
        args = (log_p(POLICY), log_p(REFERENCE), estimator)
        torch.testing.assert_close(
            kl_penalty(*args, gradient=gradient, old_logprobs=old),
            kl_penalty(*args, gradient="detach", old_logprobs=old),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize(("alias", "name"), [("kl", "k1"), ("mse", "k2"), ("low_var_kl", "k3")])
def test_names_of_other_trainers(alias, name):
    for suffix in ("", "+"):
        args = (log_p(POLICY), log_p(REFERENCE))
        assert torch.equal(kl_penalty(*args, alias + suffix), kl_penalty(*args, name + suffix))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_plus_is_the_straight_through_gradient(estimator):
    logprobs = log_p(POLICY).requires_grad_()
    values, gradients = [], []
    for options in (
        {"kl_penalty": estimator + "+"},
        {"kl_penalty": estimator, "gradient": "straight_through"},
        {"kl_penalty": estimator + "+", "gradient": "straight_through"},
    ):
        value = kl_penalty(logprobs, log_p(REFERENCE), **options)
        values.append(value)
        gradients.append(torch.autograd.grad(value.sum(), logprobs)[0])
    assert all(torch.equal(values[0], value) for value in values)
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
    torch.testing.assert_close(gradients[0], log_p(POLICY) - log_p(REFERENCE), rtol=0, atol=0)


def test_no_reference_or_old_gradient():
    logprobs, ref, old = (log_p(x).requires_grad_() for x in (POLICY, REFERENCE, OLD))
    for estimator, gradient in DIFFERENTIABLE:
        loss = kl_penalty(logprobs, ref, estimator, gradient=gradient, old_logprobs=old).sum()
        grads = torch.autograd.grad(loss, (logprobs, ref, old), allow_unused=True)
        assert grads[0] is not None
        assert grads[1:] == (None, None)


@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize(("estimator", "gradient"), COMBINATIONS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_positions_are_exactly_zero_whatever_they_hold(
    estimator, gradient, off_policy, garbage
):
    mask = torch.tensor([1, 1, 0, 1, 0, 1, 1])
    clean = log_p(POLICY).requires_grad_()
    dirty = log_p(POLICY).masked_fill(mask == 0, garbage).requires_grad_()
    ref = log_p(REFERENCE).masked_fill(mask == 0, torch.nan)
    old = log_p(OLD).masked_fill(mask == 0, -torch.inf) if off_policy else None
    options = {"kl_penalty": estimator, "gradient": gradient, "mask": mask}
    result = kl_penalty(dirty, ref, old_logprobs=old, **options)
    expected = kl_penalty(
        clean, log_p(REFERENCE), old_logprobs=log_p(OLD) if off_policy else None, **options
    )
    assert torch.equal(result, expected)
    assert (result[mask == 0] == 0).all()
    if gradient != "detach":
        grad = torch.autograd.grad(result.sum(), dirty)[0]
        assert torch.equal(grad, torch.autograd.grad(expected.sum(), clean)[0])
        assert (grad[mask == 0] == 0).all()


def test_every_name_that_is_accepted_has_its_estimator():
    assert {name.removesuffix("+") for name in get_args(KLPenalty)} == set(SAMPLED_ESTIMATORS)
    assert set(get_args(KLPenalty)) == {*SAMPLED_ESTIMATORS, *(f"{n}+" for n in SAMPLED_ESTIMATORS)}


F = {
    "k1": (lambda d: d, lambda d: torch.ones_like(d)),
    "k2": (lambda d: d * d / 2, lambda d: d),
    "k3": (lambda d: torch.exp(-d) - 1 + d, lambda d: 1 - torch.exp(-d)),
    "abs": (torch.abs, torch.sign),
}
FAR = torch.tensor([-100.0, -50.0, -20.0, -3.0, 0.5, 20.0, 50.0, 100.0])


@pytest.mark.parametrize(("estimator", "gradient"), DIFFERENTIABLE)
def test_log_ratio_clamp_bounds_the_ratio_and_keeps_the_gradient(estimator, gradient):
    f, derivative = F[estimator]
    logprobs = FAR.clone().requires_grad_()
    value = kl_penalty(
        logprobs, torch.zeros_like(FAR), estimator, gradient=gradient, log_ratio_clamp=10.0
    )
    clamped = FAR.double().clamp(-10, 10)
    expected = {
        "pathwise": derivative(clamped),
        "straight_through": clamped,
        "score_function": f(clamped) + derivative(clamped),
    }[gradient]
    grad = torch.autograd.grad(value.sum(), logprobs)[0]
    torch.testing.assert_close(value.double(), f(clamped), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-7)
    assert (grad != 0).all()


def test_log_ratio_clamp_makes_an_infinite_ratio_finite():
    logprobs = torch.tensor([-torch.inf]).requires_grad_()
    value = kl_penalty(logprobs, torch.tensor([-1.0]), "k3", log_ratio_clamp=5.0)
    grad = torch.autograd.grad(value.sum(), logprobs)[0]
    torch.testing.assert_close(value, torch.tensor([5.0]).exp() - 6, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad, 1 - torch.tensor([5.0]).exp(), rtol=1e-6, atol=0)


def test_kl_clamp_bounds_the_value_and_keeps_the_gradient():
    d = torch.tensor([-5.0, -3.0, -1.0, 1.0, 30.0])
    for estimator in ("k2", "k3", "abs"):
        free, bound = d.clone().requires_grad_(), d.clone().requires_grad_()
        unclamped = kl_penalty(free, torch.zeros_like(d), estimator)
        clamped = kl_penalty(bound, torch.zeros_like(d), estimator, kl_clamp=2.0)
        assert torch.equal(clamped, unclamped.clamp(-2, 2))
        assert (clamped == 2).any()
        assert torch.equal(
            torch.autograd.grad(clamped.sum(), bound)[0],
            torch.autograd.grad(unclamped.sum(), free)[0],
        )
    assert torch.equal(kl_penalty(d, torch.zeros_like(d), kl_clamp=2.0), d.clamp(-2, 2))


def test_kl_clamp_comes_before_the_importance_ratio():
    value = kl_penalty(
        torch.tensor([0.0]),
        torch.tensor([-8.0]),
        gradient="detach",
        old_logprobs=torch.tensor([-1.0]),
        kl_clamp=2.0,
    )
    torch.testing.assert_close(value, 2 * torch.tensor([1.0]).exp(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("d", [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 1e-2])
def test_k3_keeps_its_digits_at_small_differences(d):
    difference = torch.tensor([d, -d])
    exact = torch.expm1(-difference.double()) + difference.double()
    value = kl_penalty(difference, torch.zeros(2), "k3").double()
    # expm1 and the sum each round a number of size d; exp(-d) - 1 would round one of size 1.
    assert ((value - exact).abs() <= torch.finfo(torch.float32).eps * d).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_policies_have_exactly_no_kl(estimator):
    logprobs = log_p(POLICY).float().requires_grad_()
    for gradient in ("straight_through", "score_function"):
        value = kl_penalty(logprobs, logprobs.detach(), estimator, gradient=gradient)
        assert (value == 0).all()
    grad = torch.autograd.grad(
        kl_penalty(logprobs, logprobs.detach(), estimator + "+").sum(), logprobs
    )[0]
    assert (grad == 0).all()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_arithmetic_is_float32_or_float64(dtype, expected):
    logprobs, ref = log_p(POLICY).to(dtype), log_p(REFERENCE).to(dtype)
    value = kl_penalty(logprobs, ref, "k3")
    assert value.dtype == expected
    assert torch.equal(value, kl_penalty(logprobs.to(expected), ref.to(expected), "k3"))


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ValueError, {"kl_penalty": "k4"}, "'k4'"),
        (ValueError, {"gradient": "none"}, "'none'"),
        (ValueError, {"kl_penalty": "k3+", "gradient": "score_function"}, "straight-through"),
        (ValueError, {"kl_penalty": "k3+", "gradient": "detach"}, "straight-through"),
        (ValueError, {"mask": torch.ones(3)}, "mask has shape"),
        (ValueError, {"old_logprobs": torch.ones(3)}, "old_logprobs has shape"),
        (TypeError, {"old_logprobs": 1.0}, "old_logprobs is a float"),
        (ValueError, {"log_ratio_clamp": 0.0}, "log_ratio_clamp is 0"),
        (ValueError, {"kl_clamp": -1.0}, "kl_clamp is -1"),
    ],
)
def test_bad_arguments_are_named(error, options, message):
    with pytest.raises(error, match=message):
        kl_penalty(log_p(POLICY), log_p(REFERENCE), **options)


@pytest.mark.parametrize("scale", [10.0, 1.0, 1e-2, 1e-4])
def test_k3_is_never_negative_in_float32(scale):
    d = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * scale
    assert (kl_penalty(d, torch.zeros_like(d), "k3") >= 0).all()


def test_compiles_without_a_graph_break():
    def loss(logprobs, ref, old):
        options = {"log_ratio_clamp": 5.0, "kl_clamp": 2.0, "old_logprobs": old}
        through = kl_penalty(logprobs, ref, "k3+", **options)
        return (through + kl_penalty(logprobs, ref, gradient="score_function", **options)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for function in (loss, compiled):
        logprobs = log_p(POLICY).requires_grad_()
        value = function(logprobs, log_p(REFERENCE), log_p(OLD))
        grads.append(torch.autograd.grad(value, logprobs)[0])
    torch.testing.assert_close(*grads, rtol=1e-14, atol=1e-14)
