"""Replacements of TRL 1.16's output layers, which compute fused statistics tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kl_kernels.functional.hidden import linear_token_stats
from kl_kernels.functional.hidden_jsd import linear_jsd_and_entropy
from kl_kernels.schemas import BackendName


class _Head:
    """The replacement of a TRL class that is called by `apply`."""

    def __init__(
        self, original: Any, backend: BackendName | None, memory_budget: int | None
    ) -> None:
        self._original = original
        self._options: dict[str, Any] = {"backend": backend, "memory_budget": memory_budget}


class LogprobHead(_Head):
    """The replacement of TRL's `ChunkedLogProbFunction`."""

    PARAMETERS = (
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    )

    def apply(
        self,
        hidden: Tensor,  # [N, d]
        weight: Tensor,  # [V, d]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N]
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Return logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1: [N] each or None."""
        others = set(outputs) - {"log_probs", "entropy"}
        if others or logit_scale <= 0 or _stays_theirs(weight):
            theirs: tuple[Tensor | None, ...] = self._original.apply(
                hidden,
                weight,
                bias,
                targets,
                temperature,
                chunk_size,
                final_logit_softcapping,
                logit_scale,
                outputs,
            )
            return theirs
        hidden, weight, bias = _as_autocast(hidden, weight, bias)
        logprob, entropy = linear_token_stats(
            hidden,
            weight,
            targets,
            bias=bias,
            temperature=temperature,
            softcap=final_logit_softcapping,
            logit_scale=logit_scale,
            **self._options,
        )
        return logprob, entropy if "entropy" in outputs else None, None, None, None


class DivergenceHead(_Head):
    """The replacement of TRL's `ChunkedDivergenceFunction`; beta is that of `token_jsd`."""

    PARAMETERS = (
        "student_hidden",
        "student_weight",
        "student_bias",
        "teacher_hidden",
        "teacher_weight",
        "teacher_bias",
        "beta",
        "temperature",
        "student_logit_scale",
        "student_final_logit_softcapping",
        "teacher_logit_scale",
        "teacher_final_logit_softcapping",
    )

    def apply(
        self,
        student_hidden: Tensor,  # [N, d]
        student_weight: Tensor,  # [V, d]
        student_bias: Tensor | None,  # [V]
        teacher_hidden: Tensor,  # [N, teacher_d]
        teacher_weight: Tensor,  # [V, teacher_d]
        teacher_bias: Tensor | None,  # [V]
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence and the student's entropy without gradient, [N] each."""
        weights = student_weight, teacher_weight
        scales = student_logit_scale, teacher_logit_scale
        if min(scales) <= 0 or any(map(_stays_theirs, weights)):
            theirs: tuple[Tensor, Tensor] = self._original.apply(
                student_hidden,
                student_weight,
                student_bias,
                teacher_hidden,
                teacher_weight,
                teacher_bias,
                beta,
                temperature,
                student_logit_scale,
                student_final_logit_softcapping,
                teacher_logit_scale,
                teacher_final_logit_softcapping,
            )
            return theirs
        student = _as_autocast(student_hidden, student_weight, student_bias)
        teacher = _as_autocast(*map(_constant, (teacher_hidden, teacher_weight, teacher_bias)))
        return linear_jsd_and_entropy(
            *student[:2],
            *teacher[:2],
            bias=student[2],
            ref_bias=teacher[2],
            beta=beta,
            temperature=temperature,
            softcap=student_final_logit_softcapping,
            ref_softcap=teacher_final_logit_softcapping,
            logit_scale=student_logit_scale,
            ref_logit_scale=teacher_logit_scale,
            ref_temperature=None,
            group=None,
            vocab_start=None,
            **self._options,
        )


def _constant(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _stays_theirs(weight: Tensor) -> bool:
    """Whether TRL's own code must multiply by this weight.

    DeepSpeed's ZeRO-3 (`ds_id`) has parameters that are whole only while TRL gathers them. On a
    GPU nothing says yet that ours is faster: both multiply the same matrices in the same dtypes.
    Calls without a gradient go to TRL as well there: it rounds logits to bfloat16, so the old and
    the reference's log-probabilities of one head beside the policy's of the other would put that
    rounding into every ratio and KL (2 % of a ratio is usual).
    """
    return hasattr(weight, "ds_id") or weight.is_cuda


def _as_autocast(*factors: Any) -> Any:
    """Cast to the dtype that autocast multiplies in, where it is on, as TRL's heads do."""
    device = factors[0].device.type
    if not torch.is_autocast_enabled(device):
        return factors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if factor is None else factor.to(dtype) for factor in factors)
