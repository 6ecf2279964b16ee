"""The reference backend's operators on a policy, a reference and the mixture of both.

Whether a column is nearer to one or the other is known once the row is finished, so its logits are
looked at twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from kl_kernels.algebra import Mixed, RowState, Scale, from_anchor, mix, within_reach
from kl_kernels.reference_rows import as_saved, blocks, fold_rows, row_groups
from kl_kernels.schemas import MIXTURE_SUMS, output_dtype

Rows = tuple[Tensor, Tensor]  # the indices b and t of n rows, [n] each


class _States(NamedTuple):
    """Of rows that are finished, each [n] float64."""

    anchor: Tensor
    sx: Tensor
    ref_anchor: Tensor
    sy: Tensor

    @classmethod
    def of_row(cls, s: RowState) -> _States:
        return cls(s.anchor, s.sx, s.ref_anchor, s.sy)

    @classmethod
    def saved(cls, policy_state: Tensor, ref_state: Tensor, rows: Rows) -> _States:
        """policy_state, ref_state: [2, B, T]"""
        return cls(*(t[rows].double() for t in (*policy_state.unbind(), *ref_state.unbind())))


class _Models(NamedTuple):
    logits: Tensor  # [B, T, V]
    ref_logits: Tensor  # [B, T, V]
    policy: Scale
    ref: Scale
    beta: float

    def mixed(self, rows: Rows, s: _States) -> Iterator[tuple[slice, Mixed]]:
        """Of each block of the vocabulary."""
        for block in blocks(self.logits):
            here = (*rows, block)
            tx = from_anchor(self.policy(self.logits[here]), s.anchor)
            ty = from_anchor(self.ref(self.ref_logits[here]), s.ref_anchor)
            yield block, mix(tx, ty, s.sx, s.sy, self.beta)

    def sums(self, rows: Rows, s: _States) -> Tensor:  # [2, n]
        total = s.sx.new_zeros((len(MIXTURE_SUMS), len(s.sx)))
        for _, m in self.mixed(rows, s):
            total += torch.stack([m.jsd(self.beta).sum(-1), (m.p * m.log_p_over_m).sum(-1)])
        return total


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
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    models = _Models(logits, ref_logits, policy, ref, beta)
    shape, dtype = logits.shape[:-1], output_dtype(logits)
    outputs = logits.new_zeros((len(MIXTURE_SUMS), *shape), dtype=dtype)
    states = logits.new_zeros((2, 2, *shape), dtype=dtype)
    for rows in row_groups(logits, mask):
        state = as_saved(fold_rows(policy, ref, logits, ref_logits, rows), dtype)
        s = _States.of_row(within_reach(state, dtype))
        jsd, mixture_kl = models.sums(rows, s)
        for i, value in enumerate((jsd.clamp_min(0.0), mixture_kl)):
            outputs[i][rows] = value.to(dtype)
        for i, value in enumerate(s):
            states[i // 2, i % 2][rows] = value.to(dtype)
    # Outputs of an operator may not share memory.
    jsd, mixture_kl, policy_state, ref_state = (t.clone() for t in (*outputs, *states))
    return jsd, mixture_kl, policy_state, ref_state


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
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    models = _Models(logits, ref_logits, policy, ref, beta)
    sums = logits.new_zeros((len(MIXTURE_SUMS), *logits.shape[:-1]), dtype=output_dtype(logits))
    for rows in row_groups(logits, mask):
        found = models.sums(rows, _States.saved(policy_state, ref_state, rows))
        for i, value in enumerate(found):
            sums[i][rows] = value.to(sums.dtype)
    return sums


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
    """The gradient (1 - beta) p (log(p/m) - KL(p || m)) / temperature of jsd.

    For jsd = sum_i beta q_i log(q_i/m_i) + (1 - beta) p_i log(p_i/m_i) has the derivative
    (1 - beta) log(p_i/m_i) in p_i, all else cancels, and softmax subtracts its mean.
    """
    policy, ref = Scale(temperature, softcap), Scale(ref_temperature, ref_softcap)
    models = _Models(logits, ref_logits, policy, ref, beta)
    if mask is not None:
        grad_logits[~mask] = 0
    for rows in row_groups(logits, mask):
        slope = (grad_jsd[rows].double() * ((1 - beta) / temperature))[:, None]
        kl = mixture_kl[rows].double()[:, None]
        for block, m in models.mixed(rows, _States.saved(policy_state, ref_state, rows)):
            here = (*rows, block)
            grad = slope * m.p * (m.log_p_over_m - kl)
            grad_logits[here] = (grad * policy.softcap_grad(logits[here])).to(logits.dtype)
