"""The reference backend's operators on a policy, a reference and the mixture of both.

Whether a column is nearer to one or the other is known once the row is finished, so its logits are
read twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra.mixture import Mixed, mix
from kl_kernels.algebra.row import RowState, within_reach
from kl_kernels.backends.reference.rows import (
    Models,
    RowIndex,
    as_saved,
    blocks,
    row_groups,
    rows_of_state,
)
from kl_kernels.schemas import (
    MIXTURE_SUMS,
    MixturePartArgs,
    TokenJSDArgs,
    TokenJSDBackwardArgs,
    TokenJSDOutputs,
    output_dtype,
)


class _States(NamedTuple):
    """Anchors and sums of finished rows, each [n] float64."""

    anchor: Tensor
    sx: Tensor
    ref_anchor: Tensor
    sy: Tensor

    @classmethod
    def of_row(cls, s: RowState) -> _States:
        return cls(s.anchor, s.sx, s.ref_anchor, s.sy)

    @classmethod
    def saved(cls, a: MixturePartArgs | TokenJSDBackwardArgs, rows: RowIndex) -> _States:
        return cls(*rows_of_state(a.policy_state, rows), *rows_of_state(a.ref_state, rows))


def _mixed(
    models: Models, rows: RowIndex, s: _States, beta: float
) -> Iterator[tuple[slice, Mixed]]:
    """The mixture, block by block of the vocabulary."""
    for block in blocks(models.logits):
        tx, ty = models.from_anchors(rows, block, s.anchor, s.ref_anchor)
        yield block, mix(tx, ty, s.sx, s.sy, beta)


def _sums(models: Models, rows: RowIndex, s: _States, beta: float) -> Tensor:  # [2, n]
    total = s.sx.new_zeros((len(MIXTURE_SUMS), len(s.sx)))
    for _, m in _mixed(models, rows, s, beta):
        total += torch.stack([m.jsd(beta).sum(-1), (m.p * m.log_p_over_m).sum(-1)])
    return total


def token_jsd(a: TokenJSDArgs) -> TokenJSDOutputs:
    models = Models.of(a)
    shape, dtype = a.logits.shape[:-1], output_dtype(a.logits)
    sums = a.logits.new_zeros((len(MIXTURE_SUMS), *shape), dtype=dtype)
    states = a.logits.new_zeros((2, 2, *shape), dtype=dtype)
    for rows in row_groups(a.logits, a.mask):
        s = _States.of_row(within_reach(as_saved(models.fold(rows), dtype), dtype))
        jsd, mixture_kl = _sums(models, rows, s, a.beta)
        for i, value in enumerate((jsd.clamp_min(0.0), mixture_kl)):
            sums[i][rows] = value.to(dtype)
        for i, value in enumerate(s):
            states[i // 2, i % 2][rows] = value.to(dtype)
    # Outputs of an operator may not share memory.
    return TokenJSDOutputs(*(t.clone() for t in (*sums, *states)))


def mixture_part(a: MixturePartArgs) -> Tensor:
    models, dtype = Models.of(a), output_dtype(a.logits)
    sums = a.logits.new_zeros((len(MIXTURE_SUMS), *a.logits.shape[:-1]), dtype=dtype)
    for rows in row_groups(a.logits, a.mask):
        for i, value in enumerate(_sums(models, rows, _States.saved(a, rows), a.beta)):
            sums[i][rows] = value.to(dtype)
    return sums


def token_jsd_backward(a: TokenJSDBackwardArgs) -> None:
    """The gradient (1 - beta) p (log(p/m) - KL(p || m)) / temperature of jsd.

    For jsd = sum_i beta q_i log(q_i/m_i) + (1 - beta) p_i log(p_i/m_i) has the derivative
    (1 - beta) log(p_i/m_i) in p_i, all else cancels, and softmax subtracts its mean.
    """
    models = Models.of(a)
    if a.mask is not None:
        a.grad_logits[~a.mask] = 0
    for rows in row_groups(a.logits, a.mask):
        slope = (a.grad_jsd[rows].double() * ((1 - a.beta) / a.temperature))[:, None]
        kl = a.mixture_kl[rows].double()[:, None]
        for block, m in _mixed(models, rows, _States.saved(a, rows), a.beta):
            models.store(slope * m.p * (m.log_p_over_m - kl), rows, block, a.grad_logits)
