"""Epilogues of a finished row: a shaped reward, or a policy loss and its gradient.

Elementwise over rows, float64, without autograd: `policy_loss_epilogue` returns the gradient that
the row's backward starts from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.row import Finished, Upstream
from kl_kernels.schemas import ESTIMATORS, KLRewardsArgs, PolicyLossArgs, pick

K1, EXACT, K2, K3, ABS = range(len(ESTIMATORS))


def both_rule_out(logprob: Tensor, other: Tensor) -> Tensor:  # [...]
    """Whether a token's probability is 0 on both sides."""
    return (logprob == -torch.inf) & (other == -torch.inf)


def log_ratio_of(logprob: Tensor, other: Tensor) -> Tensor:  # [...]
    """`logprob` - `other`, and 0 where both are -inf.

    A token that both sides rule out is as likely on the one as on the other, so its ratio is 1. It
    stays 1 whatever the other tokens' logits become: the gradient is 0 there. (A test of `logprob
    == other` would also drop the gradient of every policy that has not moved yet.)
    """
    return torch.where(both_rule_out(logprob, other), 0.0, logprob - other)


def k3_of(log_ratio: Tensor) -> Tensor:  # [...]
    """exp(-d) - 1 + d of the log-ratio d, at least 0; +inf where d is infinite either way.

    `expm1` keeps the digits of small d, where exp(-d) - 1 rounds to 0. At d = -inf the sum would be
    inf - inf, so d ends at the smallest finite number; the gradient there is -inf.
    """
    return torch.expm1(-log_ratio) + log_ratio.clamp_min(torch.finfo(log_ratio.dtype).min)


def reward_epilogue(
    f: Finished, kl_coef: float, estimator: int, kl_clip: float | None
) -> tuple[Tensor, Tensor]:
    """The KL reward of each token, without the score, and what to add to its advantage.

    Exact KL does not depend on the sampled token, so as a reward it pulls that token nowhere; the
    correction -kl_coef (k1 - exact) gives the token its own share of the policy gradient.
    Estimators after Schulman (2020), "Approximating KL divergence".
    """
    k1 = log_ratio_of(f.logprob, f.ref_logprob)
    estimate = (k1, f.kl, k1 * k1 / 2, k3_of(k1), k1.abs())[estimator]
    if kl_clip is not None:
        k1, estimate = k1.clamp(-kl_clip, kl_clip), estimate.clamp(-kl_clip, kl_clip)
    shortfall = torch.zeros_like(k1)
    if estimator == EXACT:  # where the reference alone rules the token out, both are +inf
        shortfall = torch.where(k1 == estimate, 0.0, k1 - estimate)
    # Without a penalty an infinite KL is nobody's business: 0 * inf would be NaN.
    if kl_coef == 0:
        return torch.zeros_like(estimate), torch.zeros_like(shortfall)
    return -kl_coef * estimate, -kl_coef * shortfall


def scored_rewards(f: Finished, a: KLRewardsArgs) -> tuple[Tensor, Tensor]:
    """`reward_epilogue` with the score where it belongs, 0 where masked."""
    rewards, correction = reward_epilogue(f, a.kl_coef, a.estimator, a.kl_clip)
    position = torch.arange(a.mask.shape[1], device=a.mask.device)
    at_score = position == a.score_index[:, None]
    rewards = torch.where(a.mask, rewards, 0.0) + torch.where(at_score, a.scores[:, None], 0.0)
    return rewards, torch.where(a.mask, correction, 0.0)


def rewards_of(outputs: Sequence[Tensor], a: KLRewardsArgs) -> tuple[Tensor, Tensor]:
    """`scored_rewards` of results in the order of `Finished`, each [B, T], in their dtype."""
    finished = Finished(*(value.detach().double() for value in outputs))
    rewards, correction = scored_rewards(finished, a)
    return rewards.to(outputs[0].dtype), correction.to(outputs[0].dtype)


class PolicyLossInputs(NamedTuple):
    """Per-token inputs of the loss besides the logits, each [n] float64."""

    old_logprob: Tensor
    advantage: Tensor
    token_weight: Tensor  # share of the token's loss in the whole
    importance_weight: Tensor  # factor of the clipped loss
    ref_logprob: Tensor  # for k2 and k3


class PolicyLossParams(NamedTuple):
    clip_low: float
    clip_high: float
    dual_clip: float | None
    log_ratio_clamp: float | None
    kl_coef: float
    kl_estimator: int  # an index of ESTIMATORS
    entropy_coef: float


def policy_loss_epilogue(
    f: Finished, row: PolicyLossInputs, params: PolicyLossParams
) -> tuple[tuple[Tensor, ...], Upstream]:
    """The `schemas.POLICY_LOSS_TERMS` of each token, and the gradient of its loss.

    With r = exp(logprob - old_logprob), A the advantage, rho the importance weight and m the
    token's weight,

        loss = m (rho max(-A r, -A clip(r)) + kl_coef KL - entropy_coef H)

    and the maximum bounded by -A dual_clip where A < 0. Clipping, dual clipping and the clamp of
    log r (whose gradient passes) are those of `rl.losses.ppo_policy_loss`, k2 and k3 those of
    `rl.estimators.kl_penalty`. Where a clip decides, the clipped loss is a constant; so is r of a
    token that both policies rule out.
    """

    def clamped(log_ratio: Tensor) -> Tensor:
        bound = params.log_ratio_clamp
        return log_ratio if bound is None else log_ratio.clamp(-bound, bound)

    log_ratio = clamped(log_ratio_of(f.logprob, row.old_logprob))
    ratio = log_ratio.exp()
    unclipped = -row.advantage * ratio
    clipped = -row.advantage * ratio.clamp(1 - params.clip_low, 1 + params.clip_high)
    clip_decides = clipped > unclipped
    loss = torch.where(clip_decides, clipped, unclipped)
    dual_clip_decides = torch.zeros_like(clip_decides)
    if params.dual_clip is not None:
        bound = -row.advantage * params.dual_clip
        dual_clip_decides = (row.advantage < 0) & (loss > bound)
        loss = torch.where(dual_clip_decides, bound, loss)
    loss = row.importance_weight * loss
    # d r / d logprob = r, so the unclipped loss is its own derivative.
    constant = clip_decides | dual_clip_decides | both_rule_out(f.logprob, row.old_logprob)
    grad_logprob = torch.where(constant, 0.0, row.importance_weight * unclipped)

    kl, grad_kl = f.kl, torch.zeros_like(f.kl)
    if params.kl_estimator != EXACT:
        d = clamped(log_ratio_of(f.logprob, row.ref_logprob))
        kl = d * d / 2 if params.kl_estimator == K2 else k3_of(d)
    if params.kl_coef != 0:
        loss = loss + params.kl_coef * kl
        if params.kl_estimator == EXACT:
            grad_kl = grad_kl + params.kl_coef
        else:
            slope = d if params.kl_estimator == K2 else -torch.expm1(-d)
            grad_logprob = grad_logprob + params.kl_coef * slope
    loss = loss - params.entropy_coef * f.entropy
    grad_entropy = torch.full_like(f.entropy, -params.entropy_coef)

    m = row.token_weight
    terms = (
        m * loss,
        clip_decides.to(loss.dtype),
        dual_clip_decides.to(loss.dtype),
        k3_of(-log_ratio),
        -log_ratio,
        ratio,
        kl,
        f.entropy,
    )
    return terms, Upstream(m * grad_logprob, m * grad_kl, torch.zeros_like(m), m * grad_entropy)


def policy_losses(f: Finished, a: PolicyLossArgs) -> tuple[tuple[Tensor, ...], Upstream]:
    """`policy_loss_epilogue` of an operator's arguments; what is not given is the policy's own."""

    def or_else(given: Tensor | None, default: Tensor) -> Tensor:
        return default if given is None else given

    row = PolicyLossInputs(
        or_else(a.old_logprobs, f.logprob),
        a.advantages,
        a.token_weights,
        or_else(a.importance_weights, torch.ones_like(f.logprob)),
        or_else(a.ref_logprobs, f.logprob),
    )
    return policy_loss_epilogue(
        Finished(*(t.double() for t in f)),
        PolicyLossInputs(*(t.double() for t in row)),
        pick(PolicyLossParams, a),
    )
