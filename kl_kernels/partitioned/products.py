"""Matrix products of a head's tiles: which dtype they are multiplied in, and how.

Tensor cores multiply bfloat16 and float16 factors more than ten times as fast as float32 ones, and
add up in float32 either way. A factor is therefore multiplied as one or two *terms* of a narrow
dtype: one if it has that dtype, two if it is to be nearly as precise as float32: its rounded value,
and the rounding error rounded. Products of two rounding errors are left out: they are 2^-16 of the
whole with bfloat16.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

# Precision of the products that make gradients of hidden states and weights.
GradientPrecision = Literal["narrow", "split", "float32"]
GRADIENT_PRECISIONS = get_args(GradientPrecision)

NARROW = (torch.bfloat16, torch.float16)

Terms = tuple[Tensor, ...]  # their sum is the factor


class Multiplication(NamedTuple):
    """Dtype of the factors' terms, and the number of terms of each factor of a head."""

    dtype: torch.dtype
    hidden: int = 1
    weight: int = 1
    gradient: int = 1

    def is_narrow(self, tile_dtype: torch.dtype) -> bool:
        return self.dtype != tile_dtype


def multiplication(
    hidden: Tensor, weight: Tensor, tile_dtype: torch.dtype, precision: str
) -> Multiplication:
    """Choose how the products of a head are multiplied.

    A bfloat16 factor beside a float32 one (mixed precision over float32 weights) splits the
    float32 one. Float16 lacks the range for that.

    Args:
        hidden: the head's input, of any shape.
        weight: the head's weight.
        tile_dtype: dtype of sums, and of factors that are not multiplied in a narrower one.
        precision: of the products with gradients of logits, a `GradientPrecision`.
    """
    plain = Multiplication(tile_dtype)
    if precision == "float32":
        return plain
    dtypes = {hidden.dtype, weight.dtype}
    (dtype, *others) = sorted(dtypes, key=lambda d: d.itemsize)
    mixed = [torch.float32] if dtype == torch.bfloat16 else []
    if others not in ([], mixed) or not multiplies_narrow(hidden.device, dtype):
        return plain
    terms = {dtype: 1, torch.float32: 2}
    gradient = 2 if precision == "split" else 1
    return Multiplication(dtype, terms[hidden.dtype], terms[weight.dtype], gradient)


def multiplies_narrow(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether factors of this dtype are multiplied as they are, into float32 sums."""
    return dtype in NARROW and refusal(device, dtype) is None


@cache
def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a device does not multiply narrow factors into a float32 sum, or None if it does."""
    if device.type == "meta":  # stands for a GPU
        return None
    factor = torch.zeros((16, 16), device=device, dtype=dtype)
    try:
        torch.mm(factor, factor, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        return str(error).partition("\n")[0].partition(". ")[0]
    return None


def terms_of(rows: Tensor, memory: Tensor | None) -> Terms:  # [n, d]
    """Write one or two terms into memory [terms, n or more, d]; None: the rows are the term."""
    if memory is None:
        return (rows,)
    terms = memory[:, : len(rows)]
    terms[0].copy_(rows)
    if len(terms) == 2:
        torch.sub(rows, terms[0], out=terms[1])
    return tuple(terms.unbind())


def multiply(left: Terms, right: Terms, out: Tensor, *, add: bool) -> Tensor:
    """Write left @ right into `out`, or add it to what is there."""
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            if i + j < 2:
                _multiply(a, b, out, add=add or i + j > 0)
    return out


def _multiply(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    if a.dtype != out.dtype and refusal(a.device, a.dtype):  # as tests do on a CPU
        a, b = a.to(out.dtype), b.to(out.dtype)
    if a.dtype == out.dtype:
        if add:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
