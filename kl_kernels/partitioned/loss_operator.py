"""The policy loss of linear heads as a torch operator, which returns its gradients, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.ops.autograd import LATER, given_away, only_first
from kl_kernels.partitioned.heads import Factors, HeadOptions
from kl_kernels.partitioned.operators import (
    define_of_heads,
    empty_of_heads,
    in_place_of,
    needed,
    new_gradients,
    rows_at_hand,
)
from kl_kernels.partitioned.policy_loss import loss_and_gradients
from kl_kernels.partitioned.tiles import Rows
from kl_kernels.schemas import POLICY_LOSS_TERMS, PolicyLossArgs


class HeadsPolicyLossArgs(NamedTuple):
    """The loss's terms [8, B, T], then the gradients of hidden, weight and bias that are needed."""

    which: Tensor | None  # as `Rows` takes it
    token_ids: Tensor  # [B, T]
    old_logprobs: Tensor | None  # [B, T]
    advantages: Tensor  # [B, T]
    token_weights: Tensor  # [B, T]
    importance_weights: Tensor | None  # [B, T]
    ref_logprobs: Tensor | None  # [B, T]
    clip_low: float
    clip_high: float
    dual_clip: float | None
    log_ratio_clamp: float | None
    kl_coef: float
    kl_estimator: int  # an index of ESTIMATORS
    entropy_coef: float
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool


OF_ROWS = [field for field in HeadsPolicyLossArgs._fields if field in PolicyLossArgs._fields]


def _loss(factors: Factors, a: HeadsPolicyLossArgs, options: HeadOptions) -> list[Tensor]:
    args = PolicyLossArgs(
        logits=LATER,
        ref_logits=LATER,
        mask=LATER,
        temperature=options.temperature,
        ref_temperature=options.ref_temperature,
        softcap=options.softcap,
        ref_softcap=options.ref_softcap,
        own_gradient=LATER,
        grad_logits=LATER,
        **{field: getattr(a, field) for field in OF_ROWS},
    )
    rows = Rows(a.token_ids.shape, a.which)
    terms, gradients = loss_and_gradients(factors.heads(options), rows, args, options, a[-3:])
    return [terms, *needed(gradients)]


def _new_loss(factors: Factors, a: HeadsPolicyLossArgs, options: HeadOptions) -> list[Tensor]:
    terms = empty_of_heads(factors, options, len(POLICY_LOSS_TERMS), *a.token_ids.shape)
    return [terms, *new_gradients(factors, a, options)]


def _products(a: HeadsPolicyLossArgs) -> tuple[int, int]:
    return 1 + a.needs_hidden + a.needs_weight, 1


define_of_heads(
    "policy_loss_of_heads", HeadsPolicyLossArgs, "Tensor[]", _loss, _new_loss, _products
)


class HeadPolicyLoss(torch.autograd.Function):
    """(loss, terms [8, B, T]), whose gradients are computed in forward.

    Inputs: options, the arguments of the operator `policy_loss`, of which logits are not looked at,
    the rows that count in place of its mask, then those of `Factors`.
    """

    @staticmethod
    def forward(
        ctx: Any, options: HeadOptions, a: PolicyLossArgs, which: Tensor | None, *factors: Any
    ) -> tuple[Tensor, Tensor]:
        needs: Sequence[bool] = ctx.needs_input_grad[3:6]
        of_rows = {field: getattr(a, field) for field in OF_ROWS}
        args = HeadsPolicyLossArgs(
            which=rows_at_hand(which),
            needs_hidden=needs[0],
            needs_weight=needs[1],
            needs_bias=needs[2],
            **of_rows,
        )
        terms, *gradients = torch.ops.kl_kernels.policy_loss_of_heads(*factors, *args, *options)
        ctx.save_for_backward(*in_place_of(needs, gradients))
        ctx.backend = options.backend
        ctx.mark_non_differentiable(terms)
        return terms[0].sum(), terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _terms: None) -> tuple[Tensor | None, ...]:
        return only_first(ctx, None, None, None, *given_away(ctx, grad_loss))
