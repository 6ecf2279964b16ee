"""The operators on parts of a vocabulary: allocate the outputs, launch. No host synchronisation."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from kl_kernels.backends.triton import launch
from kl_kernels.backends.triton.fold import part_kernel
from kl_kernels.backends.triton.launch import COMPILE
from kl_kernels.backends.triton.parts import finish_parts_kernel
from kl_kernels.backends.triton.tail import tail_kernel
from kl_kernels.checks import check_token_range, values_are_at_hand
from kl_kernels.schemas import (
    NO_TOKEN,
    FinishPartsArgs,
    FoldPartArgs,
    FoldTailArgs,
    TokenKLOutputs,
    state_fields,
)


def fold_part(a: FoldPartArgs) -> Tensor:
    state = launch.per_token(a.logits, len(state_fields(a.ref_logits is not None)))
    _check_tokens(a)
    if a.token_ids.numel():
        with torch.cuda.device_of(a.logits):
            _merge_splits(a, launch.fold(a), state)
    return state


def fold_tail(a: FoldTailArgs) -> Tensor:
    state = launch.per_token(a.logits, len(state_fields(has_ref=False)))
    _check_tokens(a)
    if a.token_ids.numel():
        with torch.cuda.device_of(a.logits):
            _merge_splits(a, _fold_tail(a), state)
    return state


def finish_parts(a: FinishPartsArgs) -> TokenKLOutputs:
    n_parts, n_fields, n_batch, n_tokens = a.states.shape
    rows = (n_batch, n_tokens)

    def room(field: str) -> Tensor:
        return a.states.new_empty((2, *rows) if field.endswith("_state") else rows)

    out = TokenKLOutputs(*map(room, TokenKLOutputs._fields))
    n_rows = n_batch * n_tokens
    if n_rows:
        with torch.cuda.device_of(a.states):
            finish_parts_kernel[(-(-n_rows // launch.CONFIG.finish_rows),)](
                states_ptr=a.states,
                ranges_ptr=a.ranges,
                mask_ptr=a.mask,
                **{f"{field}_ptr": getattr(out, field) for field in out._fields},
                n_rows=n_rows,
                n_parts=n_parts,
                HAS_REF=n_fields == len(state_fields(has_ref=True)),
                PARTS=triton.next_power_of_2(n_parts),
                ROWS=launch.CONFIG.finish_rows,
                num_warps=launch.CONFIG.num_warps,
                **COMPILE,
            )
    return out


def _check_tokens(a: FoldPartArgs | FoldTailArgs) -> None:
    if not values_are_at_hand(a.token_ids):
        return
    here = a.token_ids != NO_TOKEN
    check_token_range(a.token_ids, here if a.mask is None else a.mask & here, a.logits.shape[-1])


def _fold_tail(a: FoldTailArgs) -> Tensor:
    states, sizes = launch.states_of_splits(a), launch.splits_of(a, launch.CONFIG.fold_split)
    model = launch.models_of(a)
    tail_kernel[(sizes["n_rows"] * sizes["n_splits"],)](
        states_ptr=states,
        **{name: model[name] for name in MODEL},
        **sizes,
        skipped_ptr=a.skipped_ids,
        n_ids=a.skipped_ids.shape[-1],
        mask_ptr=a.mask,
        SPLIT=launch.CONFIG.fold_split,
        **launch.tile_of(a.logits),
        **COMPILE,
    )
    return states


MODEL = ("logits_ptr", "batch_stride", "token_stride", "k", "softcap")  # without a reference


def _merge_splits(
    a: FoldPartArgs | FoldTailArgs,
    states: Tensor,  # [fields, splits, B T]
    state: Tensor,  # [fields of a part, B, T]
) -> None:
    part_kernel[(-(-a.token_ids.numel() // launch.CONFIG.finish_rows),)](
        states_ptr=states,
        **launch.models_of(a),
        **launch.splits_of(a, launch.CONFIG.fold_split),
        token_ids_ptr=a.token_ids,
        mask_ptr=a.mask,
        state_ptr=state,
        ROWS=launch.CONFIG.finish_rows,
        num_warps=launch.CONFIG.num_warps,
        **COMPILE,
    )
