"""The generalised Jensen-Shannon divergence of two linear heads' logits, which are never there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kl_kernels import checks
from kl_kernels.algebra.parts import any_token
from kl_kernels.functional.arguments import as_rows, shaped
from kl_kernels.functional.dtensor_heads import takes_dtensor_heads
from kl_kernels.functional.hidden import linear_token_kl
from kl_kernels.functional.hidden_arguments import as_autocast, prepare_heads, prepare_which
from kl_kernels.partitioned.functions import PartitionedJSD
from kl_kernels.partitioned.operators import LinearHeads
from kl_kernels.partitioned.products import GradientPrecision
from kl_kernels.schemas import BackendName

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


@takes_dtensor_heads
def linear_token_jsd(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    ref_hidden: Tensor,  # [..., ref_d]
    ref_weight: Tensor,  # [V, ref_d]
    mask: Tensor | None = None,  # [...]
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float | None = None,
    memory_budget: int | None = None,
    gradient_precision: GradientPrecision = "narrow",
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    row_index: Tensor | None = None,  # [n]
    backend: BackendName | None = None,
) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, from two models' hidden states and output
    layers.

    The result is that of `token_jsd` on the logits of both heads, logit_scale (hidden @ weight.T +
    bias), which never exist in full: with p and q the softmax of student and teacher and their
    mixture m = (1 - beta) p + beta q, jsd = beta KL(q || m) + (1 - beta) KL(p || m), beta = 0 is
    KL(q || p) and beta = 1 is KL(p || q) (Agarwal et al. 2023, arXiv 2306.13649, equation 1). The
    mixture is known once both models' rows are finished, so that forward multiplies both heads
    twice and backward once more; at beta = 0 and 1 each once.

    Args:
        hidden: [..., d] the policy's (student's) hidden states; float32, bfloat16, float16 or
            float64.
        weight: [V, d] of the policy's head; the same dtypes, not necessarily that of `hidden`. An
            adapter on the head (LoRA) is not in its weight: pass the sum with the adapter's.
        ref_hidden: [..., ref_d] the reference's (teacher's) hidden states of the same positions;
            must not require grad.
        ref_weight: [V, ref_d] of the reference's head, over the same vocabulary; must not require
            grad.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            are skipped, and give 0. Finding the other rows synchronises a GPU. None: all rows
            count.
        beta: weight of the reference in the mixture, 0 to 1.
        bias: [V] of the policy's head. None: no bias.
        ref_bias: [V] of the reference's head. None: no bias, whatever the policy's.
        temperature: divides the policy's logits; finite and above 0.
        ref_temperature: divides the reference's logits. None: the policy's temperature.
        softcap: Gemma's soft cap of the policy, after `logit_scale` and before the temperature;
            finite and above 0. None: no cap.
        ref_softcap: soft cap of the reference. None: no cap, whatever the policy's.
        logit_scale: multiplies the policy's logits (Cohere; 1 / logits_scaling for Granite); finite
            and above 0.
        ref_logit_scale: multiplies the reference's logits. None: the policy's logit_scale.
        memory_budget: bytes for the tiles of both heads and for copies of their factors in float32.
            None: 64 MiB on a CPU, 512 MiB elsewhere. The results are the same up to rounding.
        gradient_precision: of the products that make gradients, where the device multiplies
            bfloat16 or float16 factors as they are (a GPU): "narrow" rounds the gradient of the
            logits to the factors' dtype, "split" multiplies that rounding's error as well,
            "float32" brings the factors to float32, ten times slower. Sums are in float32 always.
        group: the process group that the vocabulary is sharded over: weights and biases are this
            rank's rows, hidden states are the same on all ranks. Backward takes one collective, to
            sum the gradient of the hidden states. None: the heads are whole.
        vocab_start: with a group, the global token id of this rank's first row. None: all shards
            are of one size, and in the order of the ranks.
        row_index: [n] int64 or int32 positions of the rows that count in the flattened ones,
            `mask.flatten().nonzero()[:, 0]`, with the mask or in its place: nobody then waits for
            a GPU, and a CUDA graph can be captured. None: they are looked for.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        The divergence, [...], in nats, float32 (float64 for float64 heads), differentiable with
        respect to hidden, weight and bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or
            memory_budget is too small for any tile.

    Examples:
        >>> import torch, kl_kernels
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> student, teacher = torch.tensor([[40.0, 0.0]]), torch.tensor([[0.0, 40.0]])
        >>> round(kl_kernels.linear_token_jsd(student, weight, teacher, weight).item(), 4)  # ln 2
        0.6931
    """
    jsd, _ = linear_jsd_and_entropy(
        hidden,
        weight,
        ref_hidden,
        ref_weight,
        beta=beta,
        bias=bias,
        ref_bias=ref_bias,
        mask=mask,
        temperature=temperature,
        ref_temperature=ref_temperature,
        softcap=softcap,
        ref_softcap=ref_softcap,
        logit_scale=logit_scale,
        ref_logit_scale=ref_logit_scale,
        memory_budget=memory_budget,
        gradient_precision=gradient_precision,
        group=group,
        vocab_start=vocab_start,
        row_index=row_index,
        backend=backend,
    )
    return jsd


def linear_jsd_and_entropy(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    ref_hidden: Tensor,  # [..., ref_d]
    ref_weight: Tensor,  # [V, ref_d]
    *,
    beta: float,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # [...]
    row_index: Tensor | None = None,  # [n]
    **given: Any,
) -> tuple[Tensor, Tensor]:
    """`linear_token_jsd`, with the policy's entropy, which comes with it and has no gradient.

    Both are [...]; `given` are the further options of `linear_token_jsd`.
    """
    beta = checks.check_unit_interval("beta", beta)
    options = prepare_heads(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, **given)
    if beta in (0, 1):
        kl = linear_token_kl(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            any_token(hidden),
            bias=bias,
            ref_bias=ref_bias,
            mask=mask,
            row_index=row_index,
            **given,
        )
        return kl.kl if beta == 1 else kl.forward_kl, kl.entropy.detach()
    student = as_autocast(as_rows(hidden), weight, bias)
    teacher = as_autocast(as_rows(ref_hidden), ref_weight, ref_bias)
    rows, shape = prepare_which(mask, row_index, hidden).rows, hidden.shape[:-1]
    jsd, entropy = PartitionedJSD.apply(LinearHeads(options), rows, beta, *student, *teacher)
    return shaped(jsd, shape), shaped(entropy, shape)
