"""The reference backend's operators, but those on a mixture.

Every other backend is checked against it. Only rows under the mask are read; all others are exactly
0. Vocabulary is taken in blocks and rows in groups, so memory stays bounded.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kl_kernels.algebra import parts
from kl_kernels.algebra.epilogues import policy_losses, scored_rewards
from kl_kernels.algebra.row import (
    Finished,
    Upstream,
    backward,
    coefficients,
    finish,
    within_reach,
)
from kl_kernels.backends.reference.rows import Models, as_saved, blocks, row_groups, rows_of_state
from kl_kernels.checks import check_cu_seqlens, check_token_range
from kl_kernels.schemas import (
    NO_TOKEN,
    FinishPartsArgs,
    FoldPartArgs,
    FoldTailArgs,
    GAEArgs,
    GAEOutputs,
    KLRewardsArgs,
    KLRewardsOutputs,
    PolicyLossArgs,
    ScaleGradientArgs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenKLOutputs,
    TokenStatsArgs,
    TokenStatsBackwardArgs,
    TokenStatsOutputs,
    output_dtype,
    pick,
    state_fields,
)


def token_stats(a: TokenStatsArgs) -> TokenStatsOutputs:
    return pick(TokenStatsOutputs, _token_kl(a))


def token_kl(a: TokenKLArgs) -> TokenKLOutputs:
    return _token_kl(a)


def _token_kl(a: TokenStatsArgs | TokenKLArgs | PolicyLossArgs) -> TokenKLOutputs:
    check_token_range(a.token_ids, a.mask, a.logits.shape[-1])
    models, dtype = Models.of(a), output_dtype(a.logits)
    finished = a.logits.new_zeros((5, *a.token_ids.shape), dtype=dtype)
    states = a.logits.new_zeros((2, 2, *a.token_ids.shape), dtype=dtype)
    for rows in row_groups(a.logits, a.mask):
        state = models.fold(rows)
        saved = within_reach(as_saved(state, dtype), dtype)
        result = finish(state, *models.read(rows, a.token_ids[rows]))
        for i, value in enumerate(result):
            finished[i][rows] = value.to(dtype)
        for i, value in enumerate((saved.anchor, saved.sx, saved.ref_anchor, saved.sy)):
            states[i // 2, i % 2][rows] = value.to(dtype)
    # Outputs of an operator may not share memory.
    return TokenKLOutputs(*(t.clone() for t in (*finished, *states)))


def fold_part(a: FoldPartArgs) -> Tensor:
    return _fold(a, state_fields(a.ref_logits is not None), None)


def fold_tail(a: FoldTailArgs) -> Tensor:
    return _fold(a, state_fields(has_ref=False), a.skipped_ids)


def _fold(
    a: FoldPartArgs | FoldTailArgs,
    fields: tuple[str, ...],
    skipped_ids: Tensor | None,  # [B, T, K]
) -> Tensor:
    models = Models.of(a)
    result = a.logits.new_zeros((len(fields), *a.token_ids.shape), dtype=output_dtype(a.logits))
    for rows in row_groups(a.logits, a.mask):
        skipped = None if skipped_ids is None else skipped_ids[rows]
        s = as_saved(models.fold(rows, skipped), result.dtype)
        outside = a.token_ids[rows] == NO_TOKEN
        check_token_range(a.token_ids[rows], ~outside, a.logits.shape[-1])
        xt, yt = models.read(rows, a.token_ids[rows].masked_fill(outside, 0))
        found = s._asdict() | {
            "token_tx": (xt - s.anchor).masked_fill(outside, torch.inf),
            "token_ty": (yt - s.ref_anchor).masked_fill(outside, torch.inf),
        }
        for i, field in enumerate(fields):
            result[i][rows] = found[field].to(result.dtype)
    return result


def finish_parts(a: FinishPartsArgs) -> TokenKLOutputs:
    right = parts.held_once(a.states)
    if a.ranges is not None:
        right = right & parts.tile_the_vocabulary(a.ranges)
    merged = parts.merge_parts(torch.where(right, a.states, torch.nan))
    outputs, *states = parts.finish_parts(merged, a.mask, a.states.dtype)
    return TokenKLOutputs(*outputs, *states)


def token_stats_backward(a: TokenStatsBackwardArgs) -> None:
    grads = a.grad_logprob, None, None, a.grad_entropy
    no_kl = torch.zeros_like(a.entropy)
    _backward(Models.of(a), a, grads, a.policy_state, no_kl)


def token_kl_backward(a: TokenKLBackwardArgs) -> None:
    grads = a.grad_logprob, a.grad_kl, a.grad_forward_kl, a.grad_entropy
    _backward(Models.of(a), a, grads, a.ref_state, a.kl)


def _backward(
    models: Models,
    a: TokenStatsBackwardArgs | TokenKLBackwardArgs,
    grads: tuple[Tensor | None, ...],  # [B, T] each, in the order of Upstream
    ref_state: Tensor,  # [2, B, T]
    kl: Tensor,  # [B, T]
) -> None:
    if a.mask is not None:
        a.grad_logits[~a.mask] = 0
    for rows in row_groups(a.logits, a.mask):
        zero = torch.zeros(len(rows[0]), dtype=torch.float64, device=a.logits.device)
        upstream = Upstream(*(zero if g is None else g[rows].double() for g in grads))
        anchor, sx = rows_of_state(a.policy_state, rows)
        ref_anchor, sy = rows_of_state(ref_state, rows)
        entropy = a.entropy[rows].double()
        c = coefficients(upstream, sx, sy, kl[rows].double(), entropy, a.temperature)
        for block in blocks(a.logits):
            grad = backward(*models.from_anchors(rows, block, anchor, ref_anchor), c)
            own = a.token_ids[rows] - block.start
            has = ((own >= 0) & (own < grad.shape[-1])).nonzero().squeeze(-1)
            grad[has, own[has]] += upstream.logprob[has] / a.temperature
            models.store(grad, rows, block, a.grad_logits)


def kl_rewards(a: KLRewardsArgs) -> KLRewardsOutputs:
    out = token_kl(pick(TokenKLArgs, a))
    shaped = scored_rewards(pick(Finished, out), a)
    return KLRewardsOutputs(*shaped, *out)


def policy_loss(a: PolicyLossArgs) -> Tensor:
    out = _token_kl(a)
    terms, upstream = policy_losses(pick(Finished, out), a)
    if a.grad_logits is not None:
        rounds = a.own_gradient is not None
        exact = torch.empty_like(a.logits, dtype=torch.float64) if rounds else a.grad_logits
        row_args = TokenStatsBackwardArgs(
            grad_logprob=None,
            grad_entropy=None,
            logits=a.logits,
            token_ids=a.token_ids,
            mask=a.mask,
            policy_state=out.policy_state,
            entropy=out.entropy,
            temperature=a.temperature,
            softcap=a.softcap,
            part=False,
            grad_logits=exact,
        )
        _backward(Models.of(a), row_args, upstream, out.ref_state, out.kl)
        if a.own_gradient is not None:
            a.grad_logits.copy_(exact)
            ids = a.token_ids.masked_fill(~a.mask, 0)[..., None]
            a.own_gradient.copy_(exact.gather(-1, ids)[..., 0])
    return torch.stack([torch.where(a.mask, term, 0.0) for term in terms]).to(out.logprob.dtype)


def scale_gradient(a: ScaleGradientArgs) -> None:
    a.gradient.mul_(a.factor)


def gae(a: GAEArgs) -> GAEOutputs:
    """Schulman et al. (2016), equation 16, from the last token back; 0 follows the last token.

    Skipping hands a masked token's successor on to its predecessor, as if it were not there.
    Otherwise masked rewards and values count as 0, and time passes over them.
    """
    r, v = (torch.where(a.mask, t, 0.0).double().flatten() for t in (a.rewards, a.values))
    mask, advantages = a.mask.flatten(), torch.zeros_like(r)
    n_sequences = len(a.rewards) if a.cu_seqlens is None else len(a.cu_seqlens) - 1
    next_value, next_advantage = r.new_zeros(2, n_sequences).unbind()
    for here, t in _from_last_tokens_back(a):
        delta = r[t] + a.gamma * next_value[here] - v[t]
        advantage = delta + a.gamma * a.lam * next_advantage[here]
        counts = mask[t] | (not a.skip_masked)
        next_value[here] = torch.where(counts, v[t], next_value[here])
        next_advantage[here] = torch.where(counts, advantage, next_advantage[here])
        advantages[t] = torch.where(mask[t], advantage, 0.0)
    returns = torch.where(mask, advantages + v, 0.0)
    shape, dtype = a.rewards.shape, a.rewards.dtype
    return GAEOutputs(advantages.view(shape).to(dtype), returns.view(shape).to(dtype))


def _from_last_tokens_back(a: GAEArgs) -> Iterator[tuple[slice, slice | Tensor]]:
    """Yield the sequences that have a further token, and these tokens among the flattened."""
    n_batch, n_tokens = a.rewards.shape
    if a.cu_seqlens is None:
        for t in reversed(range(n_tokens)):
            yield slice(n_batch), slice(t, None, n_tokens)
        return
    check_cu_seqlens("rewards", a.rewards.shape, a.cu_seqlens)
    # Longest first, so that those with a further token are always the first ones.
    lengths, order = a.cu_seqlens.diff().sort(descending=True)
    ends = a.cu_seqlens[1:][order]
    for back in range(1, int(lengths[:1].sum()) + 1):
        n = int((lengths >= back).sum())
        yield slice(n), ends[:n] - back
