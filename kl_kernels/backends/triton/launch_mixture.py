"""The operators on a mixture: allocate the outputs, launch. No host synchronisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kl_kernels.backends.triton import launch
from kl_kernels.backends.triton.mixture import mix_backward_kernel, mix_kernel
from kl_kernels.schemas import (
    MIXTURE_SUMS,
    MixturePartArgs,
    TokenJSDArgs,
    TokenJSDBackwardArgs,
    TokenJSDOutputs,
)


def token_jsd(a: TokenJSDArgs) -> TokenJSDOutputs:
    jsd, mixture_kl = launch.per_token(a.logits), launch.per_token(a.logits)
    states = launch.per_token(a.logits, 2), launch.per_token(a.logits, 2)
    out = TokenJSDOutputs(jsd, mixture_kl, *states)
    _mix(a, out, given=False)
    return out


def mixture_part(a: MixturePartArgs) -> Tensor:
    sums = launch.per_token(a.logits, len(MIXTURE_SUMS))
    jsd, mixture_kl = sums.unbind()
    _mix(a, TokenJSDOutputs(jsd, mixture_kl, a.policy_state, a.ref_state), given=True)
    return sums


def _mix(a: TokenJSDArgs | MixturePartArgs, out: TokenJSDOutputs, *, given: bool) -> None:
    """Write the sums and, unless they are given, the states."""
    if out.jsd.numel() == 0:
        return
    with torch.cuda.device_of(a.logits):
        mix_kernel[(out.jsd.numel(),)](
            **launch.models_of(a),
            **launch.rows_of(a.logits),
            mask_ptr=a.mask,
            policy_state_ptr=out.policy_state,
            ref_state_ptr=out.ref_state,
            jsd_ptr=out.jsd,
            mixture_kl_ptr=out.mixture_kl,
            **weights(a.beta),
            GIVEN=given,
            **launch.whole_row_tile(a.logits, a.ref_logits),
            **launch.COMPILE,
        )


def token_jsd_backward(a: TokenJSDBackwardArgs) -> None:
    split = launch.CONFIG.backward_split
    sizes = launch.splits_of(a, split)
    if sizes["n_rows"] == 0:
        return
    with torch.cuda.device_of(a.logits):
        mix_backward_kernel[(sizes["n_rows"] * sizes["n_splits"],)](
            grad_jsd_ptr=a.grad_jsd,
            **launch.models_of(a),
            **sizes,
            mask_ptr=a.mask,
            policy_state_ptr=a.policy_state,
            ref_state_ptr=a.ref_state,
            mixture_kl_ptr=a.mixture_kl,
            **launch.gradient_of(a.grad_logits),
            **weights(a.beta),
            temperature=a.temperature,
            SPLIT=split,
            **launch.gradient_tile_of(a.logits, a.ref_logits, a.grad_logits),
            **launch.COMPILE,
        )


def weights(beta: float) -> dict[str, Any]:
    """1 - beta and beta, below 1 in float32: the mixture is to stay above 0."""
    most = 1 - 2**-24
    return {"weight": min(1 - beta, most), "ref_weight": min(beta, most)}
