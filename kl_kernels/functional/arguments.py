"""Prepare the arguments of the public functions of logits for the operators: check, then shape."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels import checks


class Models(NamedTuple):
    """The logits of one or two models, and the transform of each: softcap, then temperature."""

    logits: Tensor  # [B, T, V]
    ref_logits: Any  # [B, T, V]; None where there is no reference
    temperature: float
    ref_temperature: float
    softcap: float | None
    ref_softcap: float | None

    @property
    def transforms(self) -> tuple[float, float, float | None, float | None]:
        """The last four fields, which end the arguments of every operator on two models."""
        return self[2:]


def prepare_models(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    temperature: float,
    ref_temperature: float | None,
    softcap: float | None,
    ref_softcap: float | None,
    inplace_backward: bool,
) -> Models:
    """Check the logits and their transforms, and shape the logits as [B, T, V].

    Args:
        logits: [..., V] of the policy.
        ref_logits: [..., V] of the reference.
        temperature: divides the policy's logits.
        ref_temperature: divides the reference's. None: the policy's.
        softcap: soft cap of the policy. None: no cap.
        ref_softcap: soft cap of the reference. None: no cap.
        inplace_backward: whether the gradient is to be written over the policy's logits.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.
    """
    temperature, softcap = _check_transform("", logits, temperature, softcap)
    if inplace_backward:
        _check_own_memory(logits)
    ref_temperature, ref_softcap = _check_transform(
        "ref_", ref_logits, temperature if ref_temperature is None else ref_temperature, ref_softcap
    )
    _check_reference(ref_logits, logits)
    models = as_rows(logits), as_rows(ref_logits)
    return Models(*models, temperature, ref_temperature, softcap, ref_softcap)


def prepare_policy(
    logits: Tensor,  # [..., V]
    temperature: float,
    softcap: float | None,
    inplace_backward: bool = False,
) -> Models:
    """`prepare_models` where there is no reference."""
    temperature, softcap = _check_transform("", logits, temperature, softcap)
    if inplace_backward:
        _check_own_memory(logits)
    return Models(as_rows(logits), None, temperature, temperature, softcap, None)


def _check_transform(
    prefix: str, logits: Tensor, temperature: float, softcap: float | None
) -> tuple[float, float | None]:
    """The temperature and the softcap, as Python floats."""
    checks.check_logits(f"{prefix}logits", logits)
    if not torch.compiler.is_compiling() and _are_copied(logits):
        _warn_of_copy(f"{prefix}logits", logits)
    temperature = checks.check_positive(f"{prefix}temperature", temperature)
    if softcap is not None:
        softcap = checks.check_positive(f"{prefix}softcap", softcap)
    return temperature, softcap


def _are_copied(logits: Tensor) -> bool:
    """Whether kernels cannot read the logits where they lie."""
    if logits.numel() == 0:
        return False
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return True
    outer = [d for d in range(logits.ndim - 2) if logits.shape[d] > 1]
    return any(
        logits.stride(d) != logits.stride(inner) * logits.shape[inner]
        for d, inner in pairwise(outer)
    )


def _warn_of_copy(name: str, logits: Tensor) -> None:
    """Gigabytes may be meant; whoever did not mean them should know."""
    warnings.warn(
        f"{name} of shape {tuple(logits.shape)} and strides {logits.stride()} are copied, "
        f"{logits.nbytes / 2**20:.3g} MiB: kernels need neighbouring logits to be neighbours in "
        "memory, and dimensions before the last two to be one",
        stacklevel=checks.callers_level(),
    )


def _check_own_memory(logits: Tensor) -> None:
    """Rows that share memory (`expand`) have no room for gradients of their own."""
    if any(stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape)):
        raise ValueError(
            f"inplace_backward is True, but logits of shape {tuple(logits.shape)} and strides "
            f"{logits.stride()} share memory; pass a copy, or inplace_backward=False"
        )


def _check_reference(ref_logits: Tensor, logits: Tensor) -> None:
    checks.check_same_kind("ref_logits", ref_logits, "logits", logits)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits has shape {tuple(ref_logits.shape)}, logits {tuple(logits.shape)}; "
            "they must be equal (slice both to the vocabulary they share)"
        )
    checks.check_device("ref_logits", ref_logits, logits)
    if needs_gradient(ref_logits):
        raise ValueError(
            "ref_logits requires grad, but the reference is a constant: "
            "detach it, or compute it under torch.no_grad()"
        )


def needs_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def prepare_token_ids(token_ids: Tensor, logits: Tensor) -> Tensor:  # [...], [..., V]
    """Check the sampled tokens, and shape them as [B, T] int64."""
    checks.check_token_ids(token_ids, logits)
    return as_tokens(token_ids).long()


def prepare_mask(
    mask: Tensor | None,  # [...]
    logits: Tensor,  # [..., V]
    name: str = "mask",
) -> Tensor | None:
    """Check a mask, and shape it as [B, T] bool."""
    if mask is None:
        return None
    checks.check_per_token(name, mask, logits)
    return as_tokens(checks.check_mask(name, mask))


def check_batch_of_rows(
    name: str,
    rows: Tensor,  # [B, T, width]; packed [N, width] or [1, N, width]
    width: str,
    cu_seqlens: Tensor | None,
) -> None:
    """Check the shape of logits or hidden states whose sequences matter."""
    checks.check_tensor(name, rows)
    if rows.ndim != 3 and (cu_seqlens is None or rows.ndim != 2):
        packed = "" if cu_seqlens is None else f"; with cu_seqlens [N, {width}] or [1, N, {width}]"
        raise ValueError(
            f"{name} has shape {tuple(rows.shape)}; it must be [B, T, {width}]{packed}"
        )


def as_rows(logits: Tensor) -> Tensor:  # [..., V] -> [B, T, V]
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)


def as_tokens(per_token: Tensor) -> Tensor:  # [...] -> [B, T]
    if per_token.ndim < 2:
        return per_token[(None,) * (2 - per_token.ndim)]
    return per_token.flatten(0, -2)


def shaped(output: Tensor, shape: torch.Size) -> Tensor:  # [B, T] -> [...]
    """Without the view where it would change nothing: five of them are a third of a small call."""
    return output if output.shape == shape else output.view(shape)
