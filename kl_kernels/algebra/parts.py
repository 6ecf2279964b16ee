"""Rows whose vocabulary comes in parts: tiles of a linear head, shards of several ranks.

A part's state is what the operator `fold_part` returns, [F, B, T] with the fields of
`schemas.STATE_FIELDS`. Here states are merged and finished, a few numbers per row in float64; the
vocabulary itself is the kernels' business.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.row import Finished, RowState, finish, move, within_reach
from kl_kernels.schemas import NO_TOKEN, STATE_FIELDS, state_fields


class Part(NamedTuple):
    """A row state and its token's position from the anchors, each [B, T] float64."""

    state: RowState
    token_tx: Tensor
    token_ty: Tensor


def local_token_ids(token_ids: Tensor, start: int, size: int) -> Tensor:  # [B, T]
    """Token ids counted from `start`, NO_TOKEN where that part of `size` does not hold them."""
    local = token_ids - start
    return torch.where((local >= 0) & (local < size), local, NO_TOKEN)


def any_token(logits: Tensor) -> Tensor:  # [..., V] -> [...]
    """For what does not depend on the token."""
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


def _unpack(state: Tensor) -> Part:  # [F, B, T]
    values = state.double().unbind()
    fields = dict(zip(STATE_FIELDS, values))
    if len(values) < len(STATE_FIELDS):  # without a reference the policy is its own
        zero = torch.zeros_like(fields["sx"])
        fields |= {"ref_anchor": fields["anchor"], "sy": fields["sx"], "rk": zero, "fk": zero}
        fields["token_ty"] = fields["token_tx"]
    token = fields.pop("token_tx"), fields.pop("token_ty")
    return Part(RowState(**fields), *token)


def pack(part: Part, *, has_ref: bool, dtype: torch.dtype) -> Tensor:  # [F, B, T]
    """The state tensor that `_unpack` takes apart."""
    values = part.state._asdict() | {"token_tx": part.token_tx, "token_ty": part.token_ty}
    return torch.stack([values[field] for field in state_fields(has_ref)]).to(dtype)


def merge_parts(states: Tensor) -> Part:  # [parts, F, B, T]
    """The state of the whole, in few operations whatever the number of parts.

    The order of the parts is the order of rounding.
    """
    state, token_tx, token_ty = _unpack(states.movedim(1, 0))
    anchor, ref_anchor = state.anchor.amax(0), state.ref_anchor.amax(0)
    _, _, *sums = move(state, anchor, ref_anchor)
    # One after another: the order in which `sum` adds depends on the number of rows.
    whole = reduce(torch.add, torch.stack(sums, 1).unbind())
    return Part(
        RowState(anchor, ref_anchor, *whole),
        (token_tx + (state.anchor - anchor)).amin(0),
        (token_ty + (state.ref_anchor - ref_anchor)).amin(0),
    )


def tile_the_vocabulary(ranges: Tensor) -> Tensor:  # [parts, 2] -> []
    """Whether parts, each a first token and a number of them, are 0 to V - 1, each token once."""
    start, order = ranges[:, 0].sort(stable=True)
    end = start + ranges[order, 1]
    return (start[0] == 0) & (start[1:] == end[:-1]).all()


def held_once(states: Tensor) -> Tensor:  # [parts, F, B, T] -> [B, T]
    """Whether exactly one part holds the row's token. A masked row's is held by all, or by none."""
    return (states[:, STATE_FIELDS.index("token_tx")] != torch.inf).sum(0) == 1


class Whole(NamedTuple):
    """Results and saved states of whole rows, each [B, T] or, states, [2, B, T]; 0 where masked."""

    outputs: Finished
    policy_state: Tensor
    ref_state: Tensor


def finish_parts(part: Part, mask: Tensor | None, dtype: torch.dtype) -> Whole:  # mask: [B, T]
    s = within_reach(part.state, dtype)
    finished = finish(s, part.token_tx + s.anchor, part.token_ty + s.ref_anchor)

    def kept(value: Tensor) -> Tensor:
        return (value if mask is None else torch.where(mask, value, 0.0)).to(dtype)

    return Whole(
        Finished(*map(kept, finished)),
        torch.stack([kept(s.anchor), kept(s.sx)]),
        torch.stack([kept(s.ref_anchor), kept(s.sy)]),
    )
