"""TRL: the fused functions in the place of its own, and a callback that watches the KL.

    from kl_kernels.integrations import trl

    with trl.patch():
        trainer.train()

TRL 1.16 computes GRPO's, RLOO's, KTO's, DPO's and SFT's log-probabilities from hidden states and
the output layer, and distillation losses likewise: there the linear heads take over, for what they
compute. Where it, or an earlier version, has logits, `selective_log_softmax` and its relatives do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from kl_kernels.functional.divergence import token_jsd
from kl_kernels.functional.logits import token_stats
from kl_kernels.functional.selective import selective_log_softmax
from kl_kernels.integrations.adapters import warn_of_adapted_head
from kl_kernels.integrations.entropy import entropy_from_logits
from kl_kernels.integrations.patching import Patch, Replacement, always, replacements_of
from kl_kernels.integrations.trl_callback import KLMonitorCallback
from kl_kernels.integrations.trl_heads import DivergenceHead, LogprobHead
from kl_kernels.integrations.trl_one_visit import compute_loss
from kl_kernels.schemas import BackendName

__all__ = ["KLMonitorCallback", "patch"]


def patch(*, backend: BackendName | None = None, memory_budget: int | None = None) -> Patch:
    """Put the fused functions in the place of the installed TRL's, until the patch is undone.

    Results are TRL's up to rounding, with these differences: log-probabilities and entropies are
    float32 also where TRL returns bfloat16; -inf logits have the entropy they have, not NaN.

    With TRL 1.16: `selective_log_softmax`, `entropy_from_logits`,
    `selective_log_softmax_and_entropy`, the fused output layer of `add_fused_lm_head`,
    `GRPOTrainer._compute_loss`, which tells that layer what it will ask for, the divergence of
    `DistillationTrainer` and `GKDTrainer.generalized_jsd_loss`. With 1.12: the first two,
    everywhere, PPO included. With 0.11: `logprobs_from_logits` and `entropy_from_logits`.

    GRPO's first update of a batch, without a KL, an entropy bonus or a mask by entropy or distance,
    makes the gradients of the output layer in forward, with three matrix products where TRL has
    four. That is checked in backward, where any other gradient is computed again.

    What the fused functions do not compute stays TRL's: an output layer whose parameters DeepSpeed
    ZeRO-3 shards or whose caller asks for more than log-probabilities and entropy (as SFT and the
    policies of DPO and KTO do), and a loss that is not reduced.

    On a GPU what would take longer stays TRL's as well, by count of the operations and not by
    measurement: the output layer but for GRPO's first updates, these with fewer than 4096 tokens
    (of a layer that is trained; more where it is narrower than 2048), and a divergence of fewer
    than 512. What starts from logits is replaced on any device.

    A `RuntimeWarning` tells of an adapter on the output layer in GRPO and RLOO, where TRL itself
    does not (PEFT's `inject_adapter_in_model`): their losses leave it out.

    Args:
        backend: None (best available), "cuda", "triton", "cpu" or "reference".
        memory_budget: bytes for the tiles of an output layer's logits, above 0; in GRPO a token's
            logits must find room. None: 64 MiB on a CPU; elsewhere 512 MiB, and 1 GiB for GRPO's
            first updates.

    Returns:
        The patch, in force: a context manager that undoes it, with `undo()` for other places.

    Raises:
        UnsupportedVersionError: TRL is not installed, or is not 1.16, 1.12 or 0.11, or its
            functions have other parameters than those releases had.

    Examples:
        from kl_kernels.integrations import trl

        with trl.patch():
            trainer.train()
    """
    replacements = replacements_of(_BY_VERSION, "trl", backend=backend, memory_budget=memory_budget)
    return Patch(replacements)


def _selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # [...]
    *,
    backend: BackendName | None,
) -> Tensor:
    return selective_log_softmax(logits, index, temperature, row_mask, backend=backend)


def _selective_log_softmax_and_entropy(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...]
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # [...]
    *,
    backend: BackendName | None,
) -> tuple[Tensor, Tensor]:
    logprob, entropy = token_stats(
        logits, index, mask=row_mask, temperature=temperature, backend=backend
    )
    return logprob, entropy if entropy_requires_grad else entropy.detach()


def _logprobs_from_logits(
    logits: Tensor,  # [B, T, V]
    labels: Tensor,  # [B, T]
    gather: bool = True,
    *,
    original: Any,
    backend: BackendName | None,
) -> Tensor:
    if not gather:
        whole: Tensor = original(logits, labels, gather)
        return whole
    return token_stats(logits, labels, backend=backend).logprob


def _generalized_jsd_loss(
    student_logits: Tensor,  # [B, T, V]
    teacher_logits: Tensor,  # [B, T, V]
    labels: Tensor | None = None,  # [B, T], -100: not counted
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    *,
    original: Any,
    backend: BackendName | None,
) -> Tensor:
    if num_items_in_batch is None and reduction not in ("batchmean", "sum"):
        reduced: Tensor = original(
            student_logits, teacher_logits, labels, beta, temperature, reduction
        )
        return reduced
    mask = None if labels is None else labels != -100
    total = token_jsd(
        student_logits,
        teacher_logits.detach(),
        beta=beta,
        mask=mask,
        temperature=temperature,
        backend=backend,
    ).sum()
    if num_items_in_batch is not None:  # may be 0, of a batch without tokens, whose loss is 0
        count = num_items_in_batch
        return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))
    if reduction == "sum":
        return total
    return total / (max(len(student_logits), 1) if mask is None else mask.sum().clamp(min=1))


def _checked_loss(original: Any) -> Any:
    """Make `RLOOTrainer._compute_loss` one that warns of what its output layer leaves out."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        warn_of_adapted_head(self.model, "RLOOTrainer")
        loss: Tensor = original(self, model, inputs)
        return loss

    return _compute_loss


_SELECTIVE = "trl.trainer.utils", "selective_log_softmax"
_ENTROPY = "trl.trainer.utils", "entropy_from_logits", ("logits", "chunk_size")


def _with_fused_heads(
    backend: BackendName | None, memory_budget: int | None
) -> Sequence[Replacement]:
    """Return the replacements for TRL 1.16."""
    logprobs = ("logits", "index", "temperature", "row_mask")
    both = ("logits", "index", "entropy_requires_grad", "temperature", "row_mask")
    return [
        Replacement(
            *_SELECTIVE, logprobs, always(partial(_selective_log_softmax, backend=backend))
        ),
        Replacement(*_ENTROPY, always(entropy_from_logits(backend))),
        Replacement(
            "trl.trainer.utils",
            "selective_log_softmax_and_entropy",
            both,
            always(partial(_selective_log_softmax_and_entropy, backend=backend)),
        ),
        Replacement(
            "trl.trainer.utils",
            "_ChunkedLogProbFunction",
            LogprobHead.PARAMETERS,
            lambda original: LogprobHead(original, backend, memory_budget),
        ),
        Replacement(
            "trl.trainer.grpo_trainer",
            "GRPOTrainer._compute_loss",
            ("self", "model", "inputs"),
            compute_loss,
        ),
        Replacement(
            "trl.trainer.rloo_trainer",
            "RLOOTrainer._compute_loss",
            ("self", "model", "inputs"),
            _checked_loss,
        ),
        Replacement(
            "trl.trainer.distillation_trainer",
            "ChunkedDivergenceFunction",
            DivergenceHead.PARAMETERS,
            lambda original: DivergenceHead(original, backend, memory_budget),
        ),
        Replacement(
            "trl.experimental.gkd.gkd_trainer",
            "GKDTrainer.generalized_jsd_loss",
            (
                "student_logits",
                "teacher_logits",
                "labels",
                "beta",
                "temperature",
                "reduction",
                "num_items_in_batch",
            ),
            lambda original: staticmethod(
                partial(_generalized_jsd_loss, original=original.__func__, backend=backend)
            ),
        ),
    ]


def _with_logits(backend: BackendName | None, memory_budget: int | None) -> Sequence[Replacement]:
    """Return the replacements for TRL 1.12."""
    return [
        Replacement(
            *_SELECTIVE,
            ("logits", "index"),
            always(partial(_selective_log_softmax, backend=backend)),
        ),
        Replacement(*_ENTROPY, always(entropy_from_logits(backend))),
    ]


def _classic(backend: BackendName | None, memory_budget: int | None) -> Sequence[Replacement]:
    """Return the replacements for TRL 0.11."""
    return [
        Replacement(
            "trl.core",
            "logprobs_from_logits",
            ("logits", "labels", "gather"),
            lambda original: partial(_logprobs_from_logits, original=original, backend=backend),
        ),
        Replacement(
            "trl.core",
            "entropy_from_logits",
            ("logits",),
            always(entropy_from_logits(backend)),
        ),
    ]


_BY_VERSION = {"1.16": _with_fused_heads, "1.12": _with_logits, "0.11": _classic}
