"""Clamps that bound a value and leave its gradient alive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _WithValue(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(carrier: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def with_value(carrier: Tensor, value: Tensor) -> Tensor:  # [...], [...]
    """The value of `value`, the gradient of `carrier` (straight-through).

    The usual `carrier + (value - carrier).detach()` rounds, and is NaN where a carrier is infinite.
    """
    # Detached, since torch sends zeros where there is no gradient: 0 * inf on the way is NaN.
    result: Tensor = _WithValue.apply(carrier, value.detach())
    return result


def clamp_value(x: Tensor, bound: float | None) -> Tensor:  # [...]
    """`x` clamped to [-bound, bound] whose gradient is 1 everywhere, also where it is clamped.

    A plain clamp has gradient 0 there: the tokens furthest off would lose all pull-back.
    """
    return x if bound is None else with_value(x, x.clamp(-bound, bound))
