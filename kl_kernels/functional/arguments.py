"""From what the fused functions are given to what the operators take: checks and shapes."""

from __future__ import annotations

import warnings
from itertools import pairwise

import torch
from torch import Tensor

from kl_kernels import checks


def check_scaled_logits(
    prefix: str,
    logits: Tensor,
    temperature: float,
    softcap: float | None,
    stacklevel: int = 5,  # from `warnings.warn` to whoever called the public function
) -> tuple[float, float | None]:
    """The temperature and the softcap, as Python floats."""
    checks.check_logits(f"{prefix}logits", logits)
    _warn_of_copy(f"{prefix}logits", logits, stacklevel)
    temperature = checks.check_positive(f"{prefix}temperature", temperature)
    if softcap is not None:
        softcap = checks.check_positive(f"{prefix}softcap", softcap)
    return temperature, softcap


def _warn_of_copy(name: str, logits: Tensor, stacklevel: int) -> None:
    """Gigabytes may be meant; whoever did not mean them should know."""
    if torch.compiler.is_compiling() or not _has_to_be_copied(logits):
        return
    warnings.warn(
        f"{name} of shape {tuple(logits.shape)} and strides {logits.stride()} are copied, "
        f"{logits.nbytes / 2**20:.3g} MiB: kernels need neighbouring logits to be neighbours in "
        "memory, and dimensions before the last two to be one",
        stacklevel=stacklevel,
    )


def _has_to_be_copied(logits: Tensor) -> bool:
    if logits.numel() == 0:
        return False
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return True
    outer = [d for d in range(logits.ndim - 2) if logits.shape[d] > 1]
    return any(
        logits.stride(d) != logits.stride(inner) * logits.shape[inner]
        for d, inner in pairwise(outer)
    )


def check_reference(
    ref_logits: Tensor, logits: Tensor, temperature: float, softcap: float | None
) -> tuple[float, float | None]:
    """The reference's temperature and softcap, as Python floats."""
    scale = check_scaled_logits("ref_", ref_logits, temperature, softcap, stacklevel=6)
    checks.check_same_kind("ref_logits", ref_logits, "logits", logits)
    if ref_logits.shape != logits.shape:
        raise ValueError(
            f"ref_logits has shape {tuple(ref_logits.shape)}, logits {tuple(logits.shape)}; "
            "they have to be equal (slice both to the vocabulary they share)"
        )
    checks.check_device("ref_logits", ref_logits, logits)
    if needs_gradient(ref_logits):
        raise ValueError(
            "ref_logits requires grad, but the reference is a constant: "
            "detach it, or compute it under torch.no_grad()"
        )
    return scale


def needs_gradient(tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and tensor.requires_grad


def check_inplace(logits: Tensor, inplace_backward: bool) -> None:
    """Rows that share memory (`expand`) have no room for gradients of their own."""
    if inplace_backward and any(
        stride == 0 and size > 1 for stride, size in zip(logits.stride(), logits.shape)
    ):
        raise ValueError(
            f"inplace_backward is True, but logits of shape {tuple(logits.shape)} and strides "
            f"{logits.stride()} share memory; pass a copy, or inplace_backward=False"
        )


def as_rows(logits: Tensor) -> Tensor:  # [..., V] -> [B, T, V]
    if logits.ndim < 3:
        return logits[(None,) * (3 - logits.ndim)]
    return logits.flatten(0, -3)


def shaped(output: Tensor, shape: torch.Size) -> Tensor:  # [B, T] -> [...]
    """Without the view where it would change nothing: five of them are a third of a small call."""
    return output if output.shape == shape else output.view(shape)


def as_tokens(per_token: Tensor) -> Tensor:  # [...] -> [B, T]
    if per_token.ndim < 2:
        return per_token[(None,) * (2 - per_token.ndim)]
    return per_token.flatten(0, -2)


def as_mask(
    mask: Tensor | None,  # [...]
    logits: Tensor,  # [..., V]
    name: str = "mask",
) -> Tensor | None:  # [B, T] bool
    if mask is None:
        return None
    checks.check_per_token(name, mask, logits)
    return as_tokens(checks.check_mask(name, mask))
