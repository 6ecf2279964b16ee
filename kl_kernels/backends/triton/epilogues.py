"""Epilogues of finished rows, elementwise in float32: see `algebra/epilogues.py`.

ESTIMATOR is an index into `schemas.ESTIMATORS`.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import KEEP_NAN, Upstream
from kl_kernels.schemas import ESTIMATORS

K1 = tl.constexpr(ESTIMATORS.index("k1"))
EXACT = tl.constexpr(ESTIMATORS.index("exact"))
K2 = tl.constexpr(ESTIMATORS.index("k2"))
K3 = tl.constexpr(ESTIMATORS.index("k3"))


@triton.jit
def reward_epilogue(f, kl_coef, kl_clip, ESTIMATOR: tl.constexpr):
    """The KL reward without the score, and what to add to the advantage."""
    k1 = log_ratio_of(f.logprob, f.ref_logprob)
    if ESTIMATOR == K1:
        estimate = k1
    elif ESTIMATOR == EXACT:
        estimate = f.kl
    elif ESTIMATOR == K2:
        estimate = 0.5 * k1 * k1
    elif ESTIMATOR == K3:
        estimate = exp_minus_linear(-k1)
    else:
        estimate = tl.abs(k1)
    k1, estimate = clamp(k1, kl_clip), clamp(estimate, kl_clip)
    correction = tl.zeros_like(k1)
    if ESTIMATOR == EXACT:
        # Where the reference alone rules the token out, both are +inf.
        correction = tl.where(k1 == estimate, 0.0, (k1 - estimate) * -kl_coef)
    # Without a penalty an infinite KL is nobody's business: 0 * inf would be NaN.
    reward = tl.where(kl_coef == 0.0, 0.0, estimate * -kl_coef)
    return reward, tl.where(kl_coef == 0.0, 0.0, correction)


class PolicyLossTerms(NamedTuple):
    """In the order of `schemas.POLICY_LOSS_TERMS`."""

    loss: tl.tensor
    clip_fraction: tl.tensor
    clip_fraction_dual: tl.tensor
    approx_kl: tl.tensor
    approx_kl_k1: tl.tensor
    ratio_mean: tl.tensor
    kl: tl.tensor
    entropy: tl.tensor


class Token(NamedTuple):
    """Inputs of a token's policy loss."""

    old_logprob: tl.tensor
    advantage: tl.tensor
    weight: tl.tensor
    importance_weight: tl.tensor
    ref_logprob: tl.tensor  # for k2 and k3


class PolicyLossParams(NamedTuple):
    """See `schemas.PolicyLossArgs`; the optional ones may be None."""

    clip_low: tl.tensor
    clip_high: tl.tensor
    dual_clip: tl.tensor
    log_ratio_clamp: tl.tensor
    kl_coef: tl.tensor
    entropy_coef: tl.tensor


@triton.jit
def policy_loss_epilogue(
    f, token, params, ESTIMATOR: tl.constexpr, HAS_KL: tl.constexpr, HAS_ENTROPY: tl.constexpr
):
    """`f`: `Finished`, `token`: `Token`, `params`: `PolicyLossParams`.

    HAS_KL, HAS_ENTROPY: whether their coefficients differ from 0. If not they are left out:
    0 * inf would be NaN.
    """
    log_ratio = clamp(log_ratio_of(f.logprob, token.old_logprob), params.log_ratio_clamp)
    ratio = tl.exp(log_ratio)
    unclipped = -token.advantage * ratio
    within = tl.clamp(ratio, 1.0 - params.clip_low, 1.0 + params.clip_high, KEEP_NAN)
    clipped = -token.advantage * within
    clip_decides = clipped > unclipped
    loss = tl.where(clip_decides, clipped, unclipped)
    # The ratio of a token that both policies rule out is a constant, too.
    constant, clip_fraction_dual = clip_decides | both_rule_out(f.logprob, token.old_logprob), 0.0
    if params.dual_clip is not None:
        bound = -token.advantage * params.dual_clip
        dual_clip_decides = (token.advantage < 0.0) & (loss > bound)
        loss = tl.where(dual_clip_decides, bound, loss)
        constant = constant | dual_clip_decides
        clip_fraction_dual = dual_clip_decides.to(tl.float32)
    loss = token.importance_weight * loss
    # d ratio / d logprob is the ratio, so the unclipped loss is its own derivative.
    grad_logprob = tl.where(constant, 0.0, token.importance_weight * unclipped)

    kl = f.kl
    if ESTIMATOR != EXACT:
        d = clamp(log_ratio_of(f.logprob, token.ref_logprob), params.log_ratio_clamp)
        kl, slope = exp_minus_linear(-d), -expm1(-d)
        if ESTIMATOR == K2:
            kl, slope = 0.5 * d * d, d
    grad_kl, grad_entropy = 0.0, 0.0
    if HAS_KL:
        loss += params.kl_coef * kl
        if ESTIMATOR == EXACT:
            grad_kl = token.weight * params.kl_coef
        else:
            grad_logprob += params.kl_coef * slope
    if HAS_ENTROPY:
        loss -= params.entropy_coef * f.entropy
        grad_entropy = token.weight * -params.entropy_coef

    terms = PolicyLossTerms(
        token.weight * loss,
        clip_decides.to(tl.float32),
        clip_fraction_dual,
        exp_minus_linear(log_ratio),
        -log_ratio,
        ratio,
        kl,
        f.entropy,
    )
    return terms, Upstream(token.weight * grad_logprob, grad_kl, 0.0, grad_entropy)


@triton.jit
def both_rule_out(logprob, other):
    """Whether a token's probability is 0 on both sides."""
    return (logprob == float("-inf")) & (other == float("-inf"))


@triton.jit
def log_ratio_of(logprob, other):
    """The difference, and 0 where both are -inf: what both sides rule out has a ratio of 1."""
    return tl.where(both_rule_out(logprob, other), 0.0, logprob - other)


@triton.jit
def clamp(x, bound):
    if bound is not None:
        x = tl.clamp(x, -bound, bound, KEEP_NAN)
    return x


# Below this exp(d) - 1 cancels, and the series below has converged.
SMALL = tl.constexpr(0.35)
LARGEST = tl.constexpr(3.4028234663852886e38)  # float32


@triton.jit
def exp_minus_linear(d):
    """exp(d) - 1 - d, +inf where d is infinite either way."""
    series = 1 / 24 + d * (1 / 120 + d * (1 / 720 + d * (1 / 5040)))
    series = d * d * (1 / 2 + d * (1 / 6 + d * series))
    # exp(inf) - inf would be NaN. (NaN is no minimum here, but exp(d) is NaN then.)
    return tl.where(tl.abs(d) < SMALL, series, tl.exp(d) - 1.0 - tl.minimum(d, LARGEST))


@triton.jit
def expm1(d):
    """exp(d) - 1."""
    return tl.where(tl.abs(d) < SMALL, exp_minus_linear(d) + d, tl.exp(d) - 1.0)
