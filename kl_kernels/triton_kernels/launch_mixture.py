"""The operators on a mixture: allocate the outputs, launch. No host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.schemas import MIXTURE_SUMS
from kl_kernels.triton_kernels import launch
from kl_kernels.triton_kernels.math import LOG2E
from kl_kernels.triton_kernels.mixture import mix_backward_kernel, mix_kernel


def token_jsd(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    mask: Tensor | None,  # [B, T]
    beta: float,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    states = (launch.per_token(logits, 2), launch.per_token(logits, 2))
    outputs = launch.per_token(logits), launch.per_token(logits)
    _mix(
        logits, ref_logits, mask, states, outputs, beta, temperature, ref_temperature,
        softcap, ref_softcap, given=False,
    )  # fmt: skip
    return *outputs, *states


def mixture_part(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    ref_state: Tensor,  # [2, B, T]
    beta: float,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
) -> Tensor:
    sums = launch.per_token(logits, len(MIXTURE_SUMS))
    _mix(
        logits, ref_logits, mask, (policy_state, ref_state), (sums[0], sums[1]),
        beta, temperature, ref_temperature, softcap, ref_softcap, given=True,
    )  # fmt: skip
    return sums


def _mix(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    mask: Tensor | None,  # [B, T]
    states: tuple[Tensor, Tensor],  # [2, B, T]; written unless they are given
    outputs: tuple[Tensor, Tensor],  # [B, T], written
    beta: float,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    *,
    given: bool,
) -> None:
    n_rows, n_tokens, vocab_size = outputs[0].numel(), logits.shape[1], logits.shape[2]
    if n_rows == 0:
        return
    with torch.cuda.device_of(logits):
        mix_kernel[(n_rows,)](
            logits, ref_logits, mask, *states, *outputs,
            n_rows, n_tokens, vocab_size, *launch.strides_of(logits, ref_logits),
            *weights(beta), LOG2E.value / temperature, LOG2E.value / ref_temperature,
            softcap, ref_softcap, GIVEN=given,
            **launch.whole_row_tile(logits, ref_logits), **launch.COMPILE,
        )  # fmt: skip


def token_jsd_backward(
    grad_jsd: Tensor,  # [B, T]
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    mask: Tensor | None,  # [B, T]
    policy_state: Tensor,  # [2, B, T]
    ref_state: Tensor,  # [2, B, T]
    mixture_kl: Tensor,  # [B, T]
    beta: float,
    temperature: float,
    ref_temperature: float,
    softcap: float | None,
    ref_softcap: float | None,
    grad_logits: Tensor,  # [B, T, V], written; may be logits
) -> None:
    n_rows, n_tokens, vocab_size = grad_jsd.numel(), logits.shape[1], logits.shape[2]
    if n_rows == 0:
        return
    split = launch.CONFIG.backward_split
    n_splits = -(-vocab_size // split)
    with torch.cuda.device_of(logits):
        mix_backward_kernel[(n_rows * n_splits,)](
            grad_jsd, logits, ref_logits, mask, policy_state, ref_state, mixture_kl, grad_logits,
            n_rows, n_tokens, vocab_size, n_splits,
            *launch.strides_of(logits, ref_logits), *grad_logits.stride()[:2], *weights(beta),
            temperature, LOG2E.value / temperature, LOG2E.value / ref_temperature,
            softcap, ref_softcap,
            SPLIT=split, **launch.tile_of(logits, ref_logits, grad_logits), **launch.COMPILE,
        )  # fmt: skip


def weights(beta: float) -> tuple[float, float]:
    """1 - beta and beta, below 1 in float32: the mixture is to stay above 0."""
    most = 1 - 2**-24
    return min(1 - beta, most), min(beta, most)
