"""Means, variances and whitening over the positions a mask leaves.

Masked positions are selected away, never multiplied by 0: NaN there reaches neither a result nor a
gradient. Arithmetic and results are float32 (float64 for float64 input).

With `group`, statistics are those of all its ranks' positions together, the same on all of them
through one collective; a rank may have none. Gradients are those of the sum of all ranks' losses,
through one more collective in backward, so that DDP's and FSDP's averages over ranks come out as
the gradient of the mean loss (`collectives.py`). x must require grad on all ranks or on none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kl_kernels.checks import check_integer, check_like, check_mask, check_non_negative
from kl_kernels.rl.collectives import from_all_ranks, sum_over_ranks
from kl_kernels.schemas import output_dtype

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def masked_mean(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    dim: int | tuple[int, ...] | None = None,
    *,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Mean of `x` where the mask is set, over all of it or over `dim`; 0 where no position is.

    Args:
        x: [...] any real dtype.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone), of x's shape.
        dim: the dimension or dimensions to average over; None: all.
        group: ranks to average over as well; what remains must have one shape on all of them.

    Returns:
        The mean, with `dim` removed, float32 (float64 for float64 x), differentiable in x.

    Raises:
        TypeError, ValueError: `mask` is not a mask of x's shape and device, or x has no such `dim`.

    Examples:
        >>> import torch, kl_kernels
        >>> kl = torch.tensor([[1.0, 3.0, torch.nan], [5.0, 0.0, 0.0]])
        >>> mask = torch.tensor([[True, True, False], [True, False, False]])
        >>> kl_kernels.masked_mean(kl, mask)
        tensor(3.)
        >>> kl_kernels.masked_mean(kl, mask, dim=1)
        tensor([2., 5.])
    """
    check_like("mask", mask, "x", x)
    mask = check_mask("mask", mask)
    dim = _check_dim(dim, x)
    total, count = select(x, mask, output_dtype(x)).sum(dim), mask.sum(dim)
    if group is None:
        return total / count.clamp_min(1)
    total, count = sum_over_ranks(torch.stack([total.double(), count.double()]), group)
    return (total / count.clamp_min(1)).to(output_dtype(x))


def masked_var(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    *,
    unbiased: bool = True,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Variance of `x` where the mask is set; 0 where fewer than two positions are.

    One position has no spread to estimate: 0 / 0 under Bessel's correction, taken as 0 here.

    Args:
        x: [...] any real dtype.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone), of x's shape.
        unbiased: divide by n - 1 (Bessel) instead of n.
        group: ranks whose positions count as well.

    Returns:
        The variance, 0-dim, float32 (float64 for float64 x), differentiable in x.

    Raises:
        TypeError, ValueError: `mask` is not a mask of x's shape and device.

    Examples:
        >>> import torch, kl_kernels
        >>> x, mask = torch.tensor([1.0, 3.0, torch.nan]), torch.tensor([True, True, False])
        >>> kl_kernels.masked_var(x, mask)
        tensor(2.)
        >>> kl_kernels.masked_var(x, mask, unbiased=False)
        tensor(1.)
    """
    check_like("mask", mask, "x", x)
    mask = check_mask("mask", mask)
    return _moments(x, mask, group).var(unbiased=unbiased).to(output_dtype(x))


def masked_whiten(
    x: Tensor,  # [...]
    mask: Tensor,  # [...]
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
) -> Tensor:
    """`x` with unit variance where the mask is set, exactly 0 elsewhere.

    (x - mean) / sqrt(var + eps) with Bessel's correction, as in OpenAI's lm-human-preferences and
    TRL: shift_mean=True removes the mean (advantages), False puts it back (rewards). Beware that
    some libraries give the flag the opposite meaning. A single position becomes 0 (or stays what it
    is with shift_mean=False).

    Args:
        x: [...] any real dtype.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone), of x's shape.
        shift_mean: whether the mean is removed.
        eps: added to the variance; 0 or above.
        group: ranks whose positions count in mean and variance.

    Returns:
        [...] float32 (float64 for float64 x), differentiable in x.

    Raises:
        TypeError, ValueError: `mask` is not a mask of x's shape and device, or eps is negative.

    Examples:
        >>> import torch, kl_kernels
        >>> advantages = torch.tensor([[1.0, 2.0, 3.0, torch.nan]])
        >>> mask = torch.tensor([[True, True, True, False]])
        >>> kl_kernels.masked_whiten(advantages, mask)
        tensor([[-1.,  0.,  1.,  0.]])
    """
    eps = check_non_negative("eps", eps)
    check_like("mask", mask, "x", x)
    mask = check_mask("mask", mask)
    x = select(x, mask, output_dtype(x))
    moments = _moments(x, mask, group)
    mean, var = (moment.to(x.dtype) for moment in (moments.mean, moments.var()))
    whitened = (x - mean) * torch.rsqrt(var + eps)
    return select(whitened if shift_mean else whitened + mean, mask, x.dtype)


def _check_dim(
    dim: int | tuple[int, ...] | None,
    x: Tensor,
) -> int | tuple[int, ...] | None:
    """`dim` in Python's integers."""
    if dim is None:
        return None
    if isinstance(dim, (tuple, list)):
        return tuple(_dimension(d, x) for d in dim)
    return _dimension(dim, x)


def _dimension(dim: int, x: Tensor) -> int:
    found = check_integer("dim", dim)
    if not -x.ndim <= found < x.ndim:
        raise ValueError(f"dim is {found}; x of shape {tuple(x.shape)} has {x.ndim} dimensions")
    return found


class _Moments(NamedTuple):
    """Count, mean and squared deviations of the unmasked positions, each []."""

    n: Tensor
    mean: Tensor
    m2: Tensor  # the sum of squared deviations from the mean

    def var(self, *, unbiased: bool = True) -> Tensor:
        return self.m2 / (self.n - int(unbiased)).clamp_min(1)


def _moments(x: Tensor, mask: Tensor, group: ProcessGroup | None) -> _Moments:
    dtype = output_dtype(x)
    count, mean = mask.sum(), masked_mean(x, mask)
    m2 = select(x.to(dtype) - mean, mask, dtype).square().sum()
    if group is None:
        return _Moments(count, mean, m2)
    # Chan et al. (1979): deviations from a rank's own mean, so that nothing large cancels.
    own = torch.stack([count.double(), mean.double(), m2.double()])
    counts, means, m2s = from_all_ranks(own, group).unbind(1)
    count = counts.sum()
    mean = (counts * means).sum() / count.clamp_min(1)
    return _Moments(count, mean, (m2s + counts * (means - mean).square()).sum())


def select(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:  # [...], [...]
    """`x` as `dtype` with 0 at masked positions: NaN there would survive a multiplication by 0."""
    return x.to(dtype) if mask is None else torch.where(mask.bool(), x.to(dtype), 0.0)
