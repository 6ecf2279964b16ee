"""The reference backend: the operators of `schemas.KERNELS`, made of the verbs of `algebra.py`.

Every other backend is checked against it. Only rows under the mask are read; all others are exactly
0. Vocabulary is taken in blocks and rows in groups, so memory stays bounded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.algebra import (
    Finished,
    Scale,
    Upstream,
    backward,
    coefficients,
    finish,
    from_anchor,
    within_reach,
)
from kl_kernels.checks import check_token_range
from kl_kernels.epilogues import (
    PolicyLossInputs,
    PolicyLossShape,
    policy_loss_epilogue,
    scored_rewards,
)
from kl_kernels.reference_mixture import (  # noqa: F401  operators, too
    mixture_part,
    token_jsd,
    token_jsd_backward,
)
from kl_kernels.reference_rows import as_saved, blocks, fold_rows, row_groups
from kl_kernels.schemas import ALONE_FIELDS, ELSEWHERE, STATE_FIELDS, output_dtype


def token_stats(
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    # A policy alone is its own reference.
    logprob, _, _, _, entropy, policy_state, _ = token_kl(
        logits, logits, token_ids, mask, temperature, temperature, softcap, softcap
    )
    return logprob, entropy, policy_state


def token_kl(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> tuple[Tensor, ...]:
    check_token_range(token_ids, mask, logits.shape[-1])
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    finished = logits.new_zeros((5, *token_ids.shape), dtype=output_dtype(logits))
    states = logits.new_zeros((2, 2, *token_ids.shape), dtype=output_dtype(logits))
    for rows in row_groups(logits, mask):
        state = fold_rows(policy, ref, logits, ref_logits, rows)
        saved = within_reach(as_saved(state, states.dtype), states.dtype)
        token = (*rows, token_ids[rows])
        result = finish(state, policy(logits[token]), ref(ref_logits[token]))
        for i, value in enumerate(result):
            finished[i][rows] = value.to(finished.dtype)
        for i, value in enumerate((saved.anchor, saved.sx, saved.ref_anchor, saved.sy)):
            states[i // 2, i % 2][rows] = value.to(states.dtype)
    # Outputs of an operator may not share memory.
    return tuple(t.clone() for t in (*finished, *states))


def fold_part(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> Tensor:
    policy = ref = Scale(temperature, softcap)
    if ref_logits is not None:
        ref = Scale(ref_temperature, ref_softcap)
    models = logits, logits if ref_logits is None else ref_logits
    n_fields = ALONE_FIELDS if ref_logits is None else len(STATE_FIELDS)
    result = logits.new_zeros((n_fields, *token_ids.shape), dtype=output_dtype(logits))
    for rows in row_groups(logits, mask):
        s = as_saved(fold_rows(policy, ref, *models, rows), result.dtype)
        elsewhere = token_ids[rows] == ELSEWHERE
        check_token_range(token_ids[rows], ~elsewhere, logits.shape[-1])
        token = (*rows, token_ids[rows].masked_fill(elsewhere, 0))
        token_tx, token_ty = (
            (scale(model[token]) - anchor).masked_fill(elsewhere, torch.inf)
            for scale, model, anchor in zip((policy, ref), models, (s.anchor, s.ref_anchor))
        )
        fields = s.anchor, s.sx, s.ex, token_tx, s.ref_anchor, s.sy, s.rk, s.fk, token_ty
        for i, value in enumerate(fields[:n_fields]):
            result[i][rows] = value.to(result.dtype)
    return result


def token_stats_backward(
    grad_logprob: Tensor | None,  # [B, T]
    grad_entropy: Tensor | None,  # [B, T]
    logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    entropy: Tensor,  # [B, T]
    temperature: float,
    softcap: float | None,
    part: bool,
    grad_logits: Tensor,  # [B, T, V], written; may be logits
) -> None:
    token_kl_backward(
        grad_logprob, None, None, grad_entropy,
        logits, logits, token_ids, mask, policy_state, policy_state, torch.zeros_like(entropy),
        entropy, temperature, temperature, softcap, softcap, part, grad_logits,
    )  # fmt: skip


def token_kl_backward(
    grad_logprob: Tensor | None,  # [B, T]
    grad_kl: Tensor | None,  # [B, T]
    grad_forward_kl: Tensor | None,  # [B, T]
    grad_entropy: Tensor | None,  # [B, T]
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    ref_state: Tensor,  # [2, B, T]
    kl: Tensor,  # [B, T]
    entropy: Tensor,  # [B, T]
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    part: bool,
    grad_logits: Tensor,  # [B, T, V], written; may be logits
) -> None:
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    if mask is not None:
        grad_logits[~mask] = 0
    grads = (grad_logprob, grad_kl, grad_forward_kl, grad_entropy)
    for rows in row_groups(logits, mask):
        zero = torch.zeros(len(rows[0]), dtype=torch.float64, device=logits.device)
        upstream = Upstream(*(zero if g is None else g[rows].double() for g in grads))
        flat = rows[0] * logits.shape[1] + rows[1]
        (anchor, sx), (ref_anchor, sy) = (
            state.flatten(1)[:, flat].double() for state in (policy_state, ref_state)
        )
        c = coefficients(upstream, sx, sy, kl[rows].double(), entropy[rows].double(), temperature)
        for block in blocks(logits):
            here = (*rows, block)
            tx = from_anchor(policy(logits[here]), anchor)
            ty = from_anchor(ref(ref_logits[here]), ref_anchor)
            grad = backward(tx, ty, c)
            own = token_ids[rows] - block.start
            has = ((own >= 0) & (own < grad.shape[-1])).nonzero().squeeze(-1)
            grad[has, own[has]] += upstream.logprob[has] / temperature
            grad_logits[here] = (grad * policy.softcap_grad(logits[here])).to(logits.dtype)


def kl_rewards(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    scores: Tensor,  # [B]
    score_index: Tensor,  # [B], -1 for nowhere
    kl_coef: float,
    estimator: int,
    kl_clip: float | None,
    *scales: float | None,
) -> tuple[Tensor, ...]:
    outputs = token_kl(logits, ref_logits, token_ids, mask, *scales)  # type: ignore[arg-type]
    shaped = scored_rewards(
        Finished(*outputs[:5]), mask, scores, score_index, kl_coef, estimator, kl_clip
    )
    return *shaped, *outputs


def policy_loss(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor | None,  # [B, T, V]
    token_ids: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    old_logprobs: Tensor | None,  # [B, T]
    advantages: Tensor,  # [B, T]
    token_weights: Tensor,  # [B, T]
    importance_weights: Tensor | None,  # [B, T]
    ref_logprobs: Tensor | None,  # [B, T]
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
    log_ratio_clamp: float | None,
    kl_coef: float,
    kl_estimator: int,
    entropy_coef: float,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    grad_logits: Tensor | None,  # [B, T, V], written; may be logits
) -> Tensor:
    # A policy alone is its own reference; nobody asks for their KL.
    ref = logits if ref_logits is None else ref_logits
    scales = temperature, ref_temperature, softcap, ref_softcap
    if ref_logits is None:
        scales = temperature, temperature, softcap, softcap
    *finished, policy_state, ref_state = token_kl(logits, ref, token_ids, mask, *scales)
    f = Finished(*finished)

    def or_else(given: Tensor | None, default: Tensor) -> Tensor:
        return default if given is None else given

    row = PolicyLossInputs(
        or_else(old_logprobs, f.logprob),
        advantages,
        token_weights,
        or_else(importance_weights, torch.ones_like(f.logprob)),
        or_else(ref_logprobs, f.logprob),
    )
    shape = PolicyLossShape(
        clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef
    )
    terms, upstream = policy_loss_epilogue(
        Finished(*(t.double() for t in f)), PolicyLossInputs(*(t.double() for t in row)), shape
    )
    if grad_logits is not None:
        token_kl_backward(
            *upstream, logits, ref, token_ids, mask, policy_state, ref_state, f.kl, f.entropy,
            *scales, False, grad_logits,
        )  # fmt: skip
    return torch.stack([torch.where(mask, term, 0.0) for term in terms]).to(f.logprob.dtype)


def scale_gradient(gradient: Tensor, factor: Tensor) -> None:  # [B, T, V], []
    gradient.mul_(factor)


def gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    gamma: float,
    lam: float,
    skip_masked: bool,
) -> tuple[Tensor, Tensor]:
    """Schulman et al. (2016), equation 16, from the last token back; 0 follows the last token.

    Skipping hands a masked token's successor on to its predecessor, as if it were not there.
    Otherwise masked rewards and values count as 0, and time passes over them.
    """
    r, v = (torch.where(mask, t, 0.0).double() for t in (rewards, values))
    advantages = torch.zeros_like(r)
    next_value, next_advantage = r.new_zeros(len(r)), r.new_zeros(len(r))
    for t in reversed(range(r.shape[1])):
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + gamma * lam * next_advantage
        counts = mask[:, t] | (not skip_masked)
        next_value = torch.where(counts, v[:, t], next_value)
        next_advantage = torch.where(counts, advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    returns = torch.where(mask, advantages + v, 0.0)
    return advantages.to(rewards.dtype), returns.to(rewards.dtype)
