"""Divergence from a reference of which a server or a cache knows K tokens per position."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import (
    as_rows,
    needs_gradient,
    prepare_mask,
    prepare_policy,
    shaped,
)
from kl_kernels.functional.dtensors import takes_dtensors
from kl_kernels.functional.selective import check_several, put, sum_over_equals
from kl_kernels.ops.autograd import LATER, once, only_first
from kl_kernels.schemas import (
    NO_TOKEN,
    BackendName,
    FoldTailArgs,
    TokenStatsBackwardArgs,
    output_dtype,
)


@takes_dtensors
def topk_kl(
    logits: Tensor,  # [..., V]
    topk_ids: Tensor,  # [..., K]
    topk_logprobs: Tensor,  # [..., K]
    mask: Tensor | None = None,  # [...]
    *,
    beta: float = 0.0,
    temperature: float = 1.0,
    softcap: float | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """KL between policy and reference over K + 1 events: each of K tokens, or any other token.

    The K log-probabilities are the reference's over its whole vocabulary, as an inference server
    returns them for its likeliest or any other tokens. What they leave of 1 is the tail's. Merging
    events makes a divergence smaller, never larger (the data processing inequality, Cover and
    Thomas, "Elements of information theory", theorem 2.8.1), and never negative, which sums over
    the K tokens alone can be. A tail that the rounding of `topk_logprobs` hides counts as that
    rounding: it cannot be told from none.

    The policy's tail is summed from its logits, not as 1 minus the K probabilities, which leaves
    nothing but rounding where the policy is sure of itself. Logits are read once forward and once
    backward, and the gradient is written once.

    Args:
        logits: [..., V] of the policy; float32, bfloat16, float16 or float64. Row t must be of the
            position that `topk_ids[..., t, :]` are of: `model(ids).logits[:, prompt - 1 : -1]` of a
            causal LM for the answer.
        topk_ids: [..., K] int64 or int32 in [0, V); distinct where their log-probability is finite.
        topk_logprobs: [..., K] of the reference, at most 0, in nats; must not require grad. -inf:
            there is no such entry (a list may be shorter than K), and its token belongs to the
            tail. Rounding may lift one above 0, by 0.001 or 16 eps of the dtype; it counts as 0.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            give 0 and have no gradient. None: all rows count.
        beta: 0 is KL(reference || policy), 1 is KL(policy || reference), and between them the
            generalised Jensen-Shannon divergence of `token_jsd`.
        temperature: divides the policy's logits; finite and above 0. (The reference's
            log-probabilities are taken as they are.)
        softcap: Gemma's soft cap of the policy, before the temperature; finite and above 0. None:
            no cap.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        The divergence of each position, [...], in nats, differentiable; float32 (float64 for
        float64 logits). An event that only one of the two rules out makes the KL that weighs it
        infinite. NaN where a log-probability is NaN.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or (on
            a CPU) an id of a row occurs twice, or a log-probability is above 0: probabilities or
            logits have been passed. On a GPU, where looking would synchronise, its row is NaN.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.zeros(1, 4)  # policy 1/4 each; reference 1/2, 1/4, tail 1/4
        >>> ids, logprobs = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]).log()
        >>> round(kl_kernels.topk_kl(logits, ids, logprobs).item(), 4)  # (ln 2 - ln 2 / 2) / 2
        0.1733
    """
    checks.refuse_transforms("topk_kl")
    models = prepare_policy(logits, temperature, softcap)
    beta = checks.check_unit_interval("beta", beta)
    checks.check_tensor("topk_ids", topk_ids)
    check_several("topk_ids", topk_ids, logits)
    checks.check_floating("topk_logprobs", topk_logprobs)
    checks.check_like("topk_logprobs", topk_logprobs, "topk_ids", topk_ids)
    if needs_gradient(topk_logprobs):
        raise ValueError("topk_logprobs requires grad, but the reference is a constant: detach it")
    kept = prepare_mask(mask, logits)
    ids, ref = as_rows(topk_ids).long(), as_rows(topk_logprobs).double().contiguous()
    listed = ref != -torch.inf if kept is None else (ref != -torch.inf) & kept[..., None]
    checks.check_token_range(ids, listed, logits.shape[-1], "topk_ids")
    _check_distinct(ids, listed)
    eps = torch.finfo(topk_logprobs.dtype).eps
    ref = _at_most_0(ref.masked_fill(~listed, -torch.inf), max(1e-3, 16 * eps))
    events = _Events.apply(
        models.logits, ids, listed, kept, models.temperature, models.softcap, backend
    )
    if kept is not None:  # no event of a masked row is known; the gradient of all -inf is NaN
        events = torch.where(kept[..., None], events, 0.0)
    q, has_tail = _with_tail(ref, eps)
    # A list of the whole vocabulary leaves no tail, whatever the rounding of its sum says.
    has_tail &= listed.sum(-1, keepdim=True) < logits.shape[-1]
    # Where there is no entry, neither has any mass; nor in a tail without tokens.
    has_tail |= events[..., -1:] > -torch.inf
    p = events.masked_fill(~torch.cat([listed, has_tail], -1), -torch.inf).log_softmax(-1)
    q = q.masked_fill(~torch.cat([listed, has_tail], -1), -torch.inf)
    divergence = _divergence(p, q, beta)
    if kept is not None:
        divergence = torch.where(kept, divergence, 0.0)
    return shaped(divergence.to(output_dtype(logits)), logits.shape[:-1])


def _check_distinct(ids: Tensor, listed: Tensor) -> None:  # [B, T, K]
    if not checks.values_are_at_hand(ids) or ids.shape[-1] == 1:
        return
    # Entries that are not there get ids of their own.
    others = torch.arange(-ids.shape[-1], 0, device=ids.device).expand_as(ids)
    ordered = torch.where(listed, ids, others).sort(-1).values
    twice = ordered[..., 1:] == ordered[..., :-1]
    if twice.any():
        raise ValueError(
            f"topk_ids holds {int(ordered[..., 1:][twice][0])} twice at one position; "
            "the ids of a position must be distinct"
        )


def _at_most_0(logprobs: Tensor, rounding: float) -> Tensor:  # [B, T, K]
    """Map values above 0 by no more than rounding to 0, and those further above to NaN."""
    above = logprobs > rounding
    if checks.values_are_at_hand(logprobs) and above.any():
        raise ValueError(
            f"topk_logprobs holds {float(logprobs[above][0]):.6g} at an unmasked position; it must "
            "hold log-probabilities, which are at most 0"
        )
    return logprobs.clamp_max(0.0).masked_fill(above, torch.nan)


def _with_tail(logprobs: Tensor, eps: float) -> tuple[Tensor, Tensor]:  # [B, T, K]
    """Log-probabilities with that of all other tokens, [B, T, K + 1]; whether it is surely above 0.

    Log-probabilities rounded to a relative `eps`, and sums of theirs, do not tell a small tail from
    none.
    """
    p = logprobs.exp()
    tail = 1 - p.sum(-1, keepdim=True)
    rounding = eps * (1 - (p * logprobs.masked_fill(p == 0, 0.0)).sum(-1, keepdim=True))
    return torch.cat([logprobs, torch.maximum(tail, rounding).log()], -1), tail > 4 * rounding


def _divergence(p: Tensor, q: Tensor, beta: float) -> Tensor:  # [B, T, K + 1] log-probabilities
    if beta == 0:
        return _kl(q, p)
    if beta == 1:
        return _kl(p, q)
    absent = torch.maximum(p, q) == -torch.inf  # logaddexp would have no gradient there
    parts = p.masked_fill(absent, 0.0) + math.log(1 - beta), q + math.log(beta)
    mixture = torch.logaddexp(*parts).masked_fill(absent, -torch.inf)
    return beta * _kl(q, mixture) + (1 - beta) * _kl(p, mixture)


def _kl(p: Tensor, q: Tensor) -> Tensor:  # [B, T, K + 1] log-probabilities -> [B, T]
    """Sum p (log p - log q), where 0 log 0 is 0 in value and in gradient."""
    absent = p == -torch.inf
    p, q = p.masked_fill(absent, 0.0), q.masked_fill(absent, 0.0)
    kl = (p.exp() * (p - q)).masked_fill(absent, 0.0).sum(-1)
    return kl - kl.detach().clamp(max=0.0)  # below 0 by rounding alone; the gradient stays


class _Events(torch.autograd.Function):
    """Logits of K tokens, and the log of the summed exponentials of all others: [B, T, K + 1].

    Float64, and up to a constant of the row, which is not differentiated: only what does not depend
    on it may be computed from this. Entries that are not listed are part of the last.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [B, T, V]
        ids: Tensor,  # [B, T, K]
        listed: Tensor,  # [B, T, K]
        mask: Tensor | None,  # [B, T]
        temperature: float,
        softcap: float | None,
        backend: str | None,
    ) -> Tensor:
        ids = ids.where(listed, _any_listed(ids, listed))
        chosen = logits.gather(-1, ids)
        first, where = chosen.double().max(-1, keepdim=True)
        args = FoldTailArgs(
            logits=logits.detach(),
            token_ids=ids.gather(-1, where)[..., 0],
            skipped_ids=ids.masked_fill(~listed, logits.shape[-1]).sort(-1).values,
            mask=mask,
            temperature=temperature,
            softcap=softcap,
        )
        anchor, total, _, position = torch.ops.kl_kernels.fold_tail(*args, backend)
        # The kernels scale logits in their own precision: they must say where the first one
        # lies. The others are told from it by differences, in which that cancels.
        position = position.double() * math.log(2)
        position = position.masked_fill(total == 0, 0.0)  # the anchor of nothing is near nothing
        chosen = chosen.double()
        gap = (_capped(chosen, softcap) - _capped(first, softcap)) / temperature
        events = position[..., None] + gap.masked_fill(chosen == -torch.inf, -torch.inf)
        ctx.options = temperature, softcap, backend
        ctx.save_for_backward(logits, ids, listed, mask, anchor, total, chosen)
        return torch.cat([events, total.double().log()[..., None]], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, ids, listed, mask, anchor, total, chosen = ctx.saved_tensors
        temperature, softcap, backend = ctx.options
        with torch.no_grad():
            # Nothing is left of a vocabulary of which all is listed, or of a masked row.
            nothing = total == 0
            state = torch.stack([anchor, total.masked_fill(nothing, 1.0)])
            # The gradient of the logarithm of a sum is p; that of a log-probability elsewhere, -p.
            of_tail = -grad[..., -1].to(state.dtype).masked_fill(nothing, 0.0)
            *args, _ = TokenStatsBackwardArgs(
                grad_logprob=of_tail,
                grad_entropy=None,
                logits=logits,
                token_ids=torch.full_like(ids[..., 0], NO_TOKEN),
                mask=mask,
                policy_state=state,
                entropy=torch.zeros_like(of_tail),
                temperature=temperature,
                softcap=softcap,
                part=True,
                grad_logits=LATER,
            )
            gradient = torch.ops.kl_kernels.token_stats_backward(*args, backend)
            own = grad[..., :-1] * _cap_slope(chosen, softcap) / temperature
            # Over what a part of the tail would have there. Entries that are not listed have the
            # id of one that is or, in a row that lists nothing, one whose gradient is the tail's.
            own = sum_over_equals(ids, own.masked_fill(~listed, 0.0)).to(gradient.dtype)
            of_none = gradient.gather(-1, ids[..., :1])
            put(gradient, ids, own.where(listed.any(-1, keepdim=True), of_none))
        return only_first(ctx, once(gradient, logits))


def _any_listed(ids: Tensor, listed: Tensor) -> Tensor:  # [B, T, K] -> [B, T, 1]
    """An id of each row that is listed; 0 where none is."""
    first = listed.to(torch.uint8).argmax(-1, keepdim=True)
    return ids.gather(-1, first).where(listed.any(-1, keepdim=True), 0)


def _capped(chosen: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return chosen
    return softcap * torch.tanh(chosen / softcap)


def _cap_slope(chosen: Tensor, softcap: float | None) -> Tensor:
    if softcap is None:
        return torch.ones_like(chosen)
    return 1 - torch.tanh(chosen / softcap) ** 2
