"""Replacements of TRL 1.16's output layers, which compute fused statistics tile by tile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kl_kernels.functional.hidden import linear_token_stats
from kl_kernels.functional.hidden_jsd import linear_jsd_and_entropy
from kl_kernels.integrations.trl_one_visit import one_visit, take_foreseen
from kl_kernels.schemas import BackendName

# Where ours take no longer than TRL's on a GPU, by the count of `python -m kl_kernels cost` (an
# H200, bfloat16 heads of widths 896 to 4096) and the same count of TRL's: predicted, not measured.
#
# - Log-probabilities with a gradient to come and without: both multiply as many matrices, and ours
#   read float32 logits where TRL's are bfloat16: 1.04 to 1.07 times TRL's time from 8192 tokens on,
#   more below, with the entropy or not. TRL's are taken, also for calls without a gradient that
#   would be as fast: ratios and KLs are of log-probabilities of one arithmetic (2 % of a ratio is
#   usual between two).
# - A gradient that is foreseen: three products for four, 0.66 to 0.96 with a frozen head. Float32
#   sums of the weight's gradient cost what the product saves until there are enough tokens: 0.99
#   to 1.03 at 2048 tokens of width 2048 or more, 0.88 to 0.95 at 4096.
# - A divergence of two heads: 0.85 to 1.00 from 512 tokens on. With fewer the host is late.
TOKENS_OF_ONE_VISIT, ITS_WIDTH = 4096, 2048
TOKENS_OF_A_DIVERGENCE = 512


def pays_on_gpu(hidden: Tensor, weight: Tensor, *, foreseen: bool) -> bool:
    """Whether log-probabilities of these [N, d] and [V, d] take no longer than with TRL's head."""
    n, width = hidden.shape
    enough = n >= TOKENS_OF_ONE_VISIT * max(1.0, ITS_WIDTH / width)
    return foreseen and (enough or not weight.requires_grad)


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
        theirs_alone = set(outputs) - {"log_probs", "entropy"} or logit_scale <= 0
        known = None
        if not theirs_alone and not _is_sharded(weight) and not torch.compiler.is_compiling():
            known = take_foreseen(hidden, weight, _multiplied_in(hidden))
        stays = weight.is_cuda and not pays_on_gpu(hidden, weight, foreseen=known is not None)
        if theirs_alone or stays or _is_sharded(weight):
            whole: tuple[Tensor | None, ...] = self._original.apply(
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
            return whole
        hidden, weight, bias = _as_autocast(hidden, weight, bias)
        options: dict[str, Any] = {
            "temperature": temperature,
            "softcap": final_logit_softcapping,
            "logit_scale": logit_scale,
            **self._options,
        }
        if known is not None:
            logprob, entropy = one_visit(hidden, weight, bias, targets, *known, **options)
        else:
            logprob, entropy = linear_token_stats(hidden, weight, targets, bias=bias, **options)
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
        stays = student_weight.is_cuda and len(student_hidden) < TOKENS_OF_A_DIVERGENCE
        if min(scales) <= 0 or stays or any(map(_is_sharded, weights)):
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


def _is_sharded(weight: Tensor) -> bool:
    """Whether it is a parameter of DeepSpeed's ZeRO-3, whole only while TRL gathers it."""
    return hasattr(weight, "ds_id")


def _as_autocast(hidden: Any, *others: Any) -> Any:
    """Cast to the dtype that autocast multiplies in, where it is on, as TRL's heads do."""
    factors = hidden, *others
    if not torch.is_autocast_enabled(hidden.device.type):
        return factors
    dtype = _multiplied_in(hidden)
    return tuple(None if factor is None else factor.to(dtype) for factor in factors)


def _multiplied_in(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    is_on = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else hidden.dtype
