"""Means, variances and whitening over the positions a mask leaves.

Masked positions are selected away, never multiplied by 0: NaN there reaches neither a result nor a
gradient. Arithmetic and results are float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.checks import check_like, check_non_negative
from kl_kernels.schemas import output_dtype


def masked_mean(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    dim: int | tuple[int, ...] | None = None,
) -> Tensor:
    """Mean of `x` where the mask is set, over all of it or over `dim`; 0 where no position is.

    Args:
        x: any real dtype.
        mask: bool or numeric (non-zero counts), of x's shape.
        dim: the dimensions to average over; None: all.

    Returns:
        The mean, with `dim` removed, float32 (float64 for float64 x), differentiable in x.

    Raises:
        TypeError, ValueError: `mask` is not a tensor of x's shape and device.
    """
    check_like("mask", mask, "x", x)
    dim = tuple(range(x.ndim)) if dim is None else dim
    return select(x, mask, output_dtype(x)).sum(dim) / mask.bool().sum(dim).clamp_min(1)


def masked_var(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    *,
    unbiased: bool = True,
) -> Tensor:
    """Variance of `x` where the mask is set; 0 where fewer than two positions are.

    One position has no spread to estimate: 0 / 0 under Bessel's correction, taken as 0 here.

    Args:
        x: any real dtype.
        mask: bool or numeric (non-zero counts), of x's shape.
        unbiased: divide by n - 1 (Bessel) instead of n.

    Returns:
        The variance, 0-dim, float32 (float64 for float64 x), differentiable in x.

    Raises:
        TypeError, ValueError: `mask` is not a tensor of x's shape and device.
    """
    check_like("mask", mask, "x", x)
    dtype = output_dtype(x)
    deviation = select(x.to(dtype) - masked_mean(x, mask), mask, dtype)
    return deviation.square().sum() / (mask.bool().sum() - int(unbiased)).clamp_min(1)


def masked_whiten(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """`x` with unit variance where the mask is set, exactly 0 elsewhere.

    (x - mean) / sqrt(var + eps) with Bessel's correction, as in OpenAI's lm-human-preferences and
    TRL: shift_mean=True removes the mean (advantages), False puts it back (rewards). Beware that
    some libraries give the flag the opposite meaning. A single position becomes 0 (or stays what it
    is with shift_mean=False).

    Args:
        x: any real dtype.
        mask: bool or numeric (non-zero counts), of x's shape.
        shift_mean: whether the mean is removed.
        eps: added to the variance; 0 or above.

    Returns:
        [...] float32 (float64 for float64 x), differentiable in x.

    Raises:
        TypeError, ValueError: `mask` is not a tensor of x's shape and device, or eps is negative.
    """
    check_non_negative("eps", eps)
    check_like("mask", mask, "x", x)
    x = select(x, mask, output_dtype(x))
    mean = masked_mean(x, mask)
    whitened = (x - mean) * torch.rsqrt(masked_var(x, mask) + eps)
    return select(whitened if shift_mean else whitened + mean, mask, x.dtype)


def select(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:  # [...], [...]
    """`x` as `dtype` with 0 at masked positions: NaN there would survive a multiplication by 0."""
    return x.to(dtype) if mask is None else torch.where(mask.bool(), x.to(dtype), 0.0)
