"""Floating-point operations of heads' operators, for `torch.utils.flop_counter`.

Whoever counts what a step multiplies (how well a GPU is used) sees the operators alone. All rows
are taken to count: nobody knows how many a mask lets pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula


def register(name: str, products: Callable[[Sequence[Any]], tuple[int, int]]) -> None:
    """Tell torch how to count an operator whose first arguments are `heads.Factors`.

    Args:
        name: name of the operator.
        products: takes the operator's arguments, shapes in the place of tensors, and returns how
            many products as large as the policy's logits it computes, and as the reference's.
    """

    def count(*args: Any, **_: Any) -> int:
        hidden, weight, _bias, ref_hidden, ref_weight = args[:5]
        of_policy, of_reference = products(args)
        flops = of_policy * _product(hidden, weight)
        if ref_hidden is not None:
            flops += of_reference * _product(ref_hidden, ref_weight)
        return flops

    register_flop_formula(getattr(torch.ops.kl_kernels, name))(count)


def _product(hidden: Sequence[int], weight: Sequence[int]) -> int:  # [B, T, d], [V, d]
    n_batch, n_tokens, width = hidden
    return 2 * n_batch * n_tokens * width * weight[0]
