"""Gradients of linear heads by the gradients of their rows' statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.partitioned.functions import Saved, Upstream
from kl_kernels.partitioned.gradients import Write, differentiate, scale_for
from kl_kernels.partitioned.heads import HeadOptions, counted_from
from kl_kernels.partitioned.tiles import Head, Rows
from kl_kernels.schemas import (
    TokenJSDBackwardArgs,
    TokenKLBackwardArgs,
    TokenStatsBackwardArgs,
    pick,
)

# Gradients of hidden, weight and bias; None where not needed.
Gradients = list[Tensor | None]


def kl_gradients(
    heads: list[Head],
    rows: Rows,
    token_ids: Tensor,  # [B, T]
    saved: Saved,
    upstream: Upstream,
    needs: Sequence[bool],
    options: HeadOptions,
) -> Gradients:
    """Differentiate log-probabilities, KL both ways and entropy."""
    if upstream.kl is None and upstream.forward_kl is None:
        heads = heads[:1]  # the reference's logits are not computed a second time
    of_rows = Upstream(*(None if g is None else rows.take_last(g) for g in upstream))
    scale = scale_for(heads[0].multiplication, of_rows)
    if scale is not None:
        of_rows = Upstream(*(None if g is None else g * scale for g in of_rows))
    slices = _SavedSlices(saved, rows)

    def write(logits: Sequence[Tensor], which: slice, ids: Tensor, gradient: Tensor) -> None:
        g = Upstream(*(None if g is None else g[:, which] for g in of_rows))
        write_kl_gradient(logits, ids, options, g, slices.of(which), gradient)

    ids = counted_from(options.shard, rows.take_last(token_ids))
    tokens_matter = upstream.logprob is not None
    return _differentiate(heads, rows, ids, write, needs, scale, tokens_matter, options)


def jsd_gradients(
    heads: list[Head],
    rows: Rows,
    saved: Saved,
    beta: float,
    grad_jsd: Tensor,  # [B, T]
    needs: Sequence[bool],
    options: HeadOptions,
) -> Gradients:
    """Differentiate the divergence to a mixture."""
    grad = rows.take_last(grad_jsd)
    scale = scale_for(heads[0].multiplication, [grad])
    grad = grad if scale is None else grad * scale
    slices = _SavedSlices(saved, rows)

    def write(logits: Sequence[Tensor], which: slice, _ids: Tensor, gradient: Tensor) -> None:
        s = slices.of(which)
        args = TokenJSDBackwardArgs(
            grad_jsd=grad[:, which],
            logits=logits[0][None],
            ref_logits=logits[1][None],
            mask=None,
            policy_state=s.policy_state,
            ref_state=s.ref_state,
            mixture_kl=s.kl,
            beta=beta,
            temperature=options.temperature,
            ref_temperature=options.ref_temperature,
            softcap=options.softcap,
            ref_softcap=options.ref_softcap,
            grad_logits=gradient[None],
        )
        torch.ops.kl_kernels.token_jsd_backward_(*args, options.backend)

    ids = torch.zeros((1, rows.n), dtype=torch.int64, device=grad.device)  # no token matters
    return _differentiate(heads, rows, ids, write, needs, scale, False, options)


def _differentiate(
    heads: list[Head],
    rows: Rows,
    token_ids: Tensor,  # [1, n]
    write: Write,
    needs: Sequence[bool],
    scale: Tensor | None,  # []
    tokens_matter: bool,
    options: HeadOptions,
) -> Gradients:
    grad_hidden, *others = differentiate(
        heads,
        rows,
        token_ids,
        write,
        needs,
        tokens_matter=tokens_matter,
        scale=scale,
        memory_budget=options.memory_budget,
        backend=options.backend,
    )
    if grad_hidden is not None:
        if (shard := options.shard) is not None:
            # All ranks' logits come from the same hidden states.
            dist.all_reduce(grad_hidden, group=shard.group)
        grad_hidden = rows.put(grad_hidden, heads[0].hidden.dtype)
    return [grad_hidden, *others]


class _SavedSlices:
    """Saved statistics of rows, as kernels take them: copied for each slice of the rows once."""

    def __init__(self, saved: Saved, rows: Rows):
        self._saved = Saved(*map(rows.take_last, saved))
        self._known: dict[tuple[int, int], Saved] = {}

    def of(self, which: slice) -> Saved:
        key = which.start, which.stop
        if key not in self._known:
            self._known[key] = Saved(*(v[..., which].contiguous() for v in self._saved))
        return self._known[key]


def write_kl_gradient(
    logits: Sequence[Tensor],  # [rows, columns] of the policy and, maybe, of the reference
    token_ids: Tensor,  # [1, rows]
    options: HeadOptions,
    upstream: Upstream,  # each [1, rows]
    saved: Saved,
    gradient: Tensor,  # [rows, columns]
) -> None:
    policy, *reference = (of_model[None] for of_model in logits)
    args = TokenKLBackwardArgs(
        grad_logprob=upstream.logprob,
        grad_kl=upstream.kl,
        grad_forward_kl=upstream.forward_kl,
        grad_entropy=upstream.entropy,
        logits=policy,
        ref_logits=reference[0] if reference else policy,
        token_ids=token_ids,
        mask=None,
        policy_state=saved.policy_state,
        ref_state=saved.ref_state,
        kl=saved.kl,
        entropy=saved.entropy,
        temperature=options.temperature,
        ref_temperature=options.ref_temperature,
        softcap=options.softcap,
        ref_softcap=options.ref_softcap,
        part=True,
        grad_logits=gradient[None],
    )
    if reference:
        torch.ops.kl_kernels.token_kl_backward_(*args, options.backend)
    else:
        stats = pick(TokenStatsBackwardArgs, args)
        torch.ops.kl_kernels.token_stats_backward_(*stats, options.backend)
