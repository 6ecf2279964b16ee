"""Statistics of a linear head's logits without the logits.

The output layer of a language model makes [tokens, vocabulary] logits of [tokens, width] hidden
states. Here they exist a tile at a time: a tile is multiplied, read by the kernels and overwritten
by the next one; backward multiplies it again. Hidden states are [..., d], everything per token is
[...], and V is the vocabulary. Outputs are float32 (float64 for float64 heads).

Weights that are DTensors (FSDP2, tensor parallelism) are taken as they are: `dtensor_heads.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import as_rows, as_tokens, shaped
from kl_kernels.functional.dtensor_heads import takes_dtensor_heads
from kl_kernels.functional.hidden_arguments import (
    as_autocast,
    check_per_token,
    prepare_head,
    prepare_heads,
    prepare_which,
)
from kl_kernels.functional.logits import TokenKL, TokenStats
from kl_kernels.partitioned.functions import PartitionedKL
from kl_kernels.partitioned.heads import HeadOptions
from kl_kernels.partitioned.operators import LinearHeads
from kl_kernels.partitioned.products import GradientPrecision
from kl_kernels.schemas import BackendName

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


@takes_dtensor_heads
def linear_token_stats(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    token_ids: Tensor,  # [...]
    mask: Tensor | None = None,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    gradient_precision: GradientPrecision = "narrow",
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    row_index: Tensor | None = None,  # [n]
    backend: BackendName | None = None,
) -> TokenStats:
    """Log-probability and entropy of each token, from hidden states and the output layer.

    The result is that of `token_stats` on logits = logit_scale (hidden @ weight.T + bias), which
    never exist in full: z = softcap tanh(logits / softcap) / temperature, logprob = z[token] -
    logsumexp(z), entropy = -sum p log p with p = softmax(z). Logits and all sums are float32
    whatever the dtypes, and gradients are rounded to the dtype of their tensor once, at the end.
    Factors of one dtype stay what they are under autocast; of several, they are cast as it would.
    (Float32 factors are multiplied as precisely as `torch.set_float32_matmul_precision` says.)

    Rows where the mask is 0 are not multiplied: their outputs and gradients are exactly 0, even if
    the row holds NaN. Finding the other rows synchronises a GPU.

    Memory, beyond inputs, outputs and gradients: `memory_budget`; the hidden states that count,
    where a mask or strides keep them apart; in backward also the gradient of the hidden states in
    float32, where they have another dtype or rows are masked, and twice that on a GPU.

    Args:
        hidden: [..., d] the head's input; float32, bfloat16, float16 or float64. Row t must hold
            the state that `token_ids[..., t]` was sampled from:
            `model.model(ids).last_hidden_state[:, prompt - 1 : -1]` of a Hugging Face causal LM,
            with `token_ids = ids[:, prompt:]`.
        weight: [V, d] of the head (`model.lm_head.weight`); the same dtypes, not necessarily that
            of `hidden`. An adapter on the head (LoRA) is not in that attribute, and would be left
            out: pass the sum, `base_layer.weight + get_delta_weight("default")` of PEFT's layer.
        token_ids: [...] int64 or int32, in [0, V) where the mask is True.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            are skipped, and give 0. None: all rows count.
        bias: [V] of the head. None: no bias.
        temperature: divides the logits; finite and above 0.
        softcap: Gemma's soft cap, applied after `logit_scale` and before the temperature; finite
            and above 0. None: no cap.
        logit_scale: multiplies the logits (Cohere; 1 / logits_scaling for Granite); finite and
            above 0.
        memory_budget: bytes for tiles of logits and for copies of their factors in float32. None:
            64 MiB on a CPU, 512 MiB elsewhere. The results are the same up to rounding.
        gradient_precision: of the products that make gradients, where the device multiplies
            bfloat16 or float16 factors as they are (a GPU): "narrow" rounds the gradient of the
            logits to the factors' dtype, "split" multiplies that rounding's error as well,
            "float32" brings the factors to float32, ten times slower. Sums are in float32 always.
        group: the process group that the vocabulary is sharded over: weight and bias are this
            rank's rows, hidden states and token ids are the same on all ranks. Backward takes one
            collective, to sum the gradient of the hidden states. None: the head is whole.
        vocab_start: with a group, the global token id of this rank's first row. None: all shards
            are of one size, and in the order of the ranks.
        row_index: [n] int64 or int32 positions of the rows that count in the flattened ones,
            `mask.flatten().nonzero()[:, 0]`, with the mask or in its place: nobody then waits for
            a GPU, and a CUDA graph can be captured. None: they are looked for.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        TokenStats(logprob, entropy), each [...], in nats, float32 (float64 for float64 heads),
        differentiable in any mix with respect to hidden, weight and bias. An argument that does not
        require grad costs no product: a frozen head is not differentiated.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or
            memory_budget is too small for any tile.

    Examples:
        >>> import torch, kl_kernels
        >>> hidden, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> token_ids = torch.tensor([1])
        >>> out = kl_kernels.linear_token_stats(hidden, weight, token_ids)
        >>> whole = kl_kernels.token_stats(hidden @ weight.T, token_ids)
        >>> torch.allclose(out.logprob, whole.logprob), round(out.logprob.item(), 4)
        (True, -0.3133)
    """
    options = prepare_head(
        hidden,
        weight,
        bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        memory_budget=memory_budget,
        gradient_precision=gradient_precision,
        group=group,
        vocab_start=vocab_start,
        backend=backend,
    )
    outputs = _apply(hidden, weight, bias, (None, None, None), token_ids, mask, row_index, options)
    return TokenStats(outputs[0], outputs[4])


@takes_dtensor_heads
def linear_token_kl(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    ref_hidden: Tensor,  # [..., ref_d]
    ref_weight: Tensor,  # [V, ref_d]
    token_ids: Tensor,  # [...]
    mask: Tensor | None = None,  # [...]
    *,
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
) -> TokenKL:
    """Log-probabilities, exact KL both ways and entropy, from two models' hidden states and output
    layers.

    The result is that of `token_kl` on the logits of both heads, logit_scale (hidden @ weight.T +
    bias), which never exist in full: a tile is multiplied, read and overwritten by the next one, in
    float32, within `memory_budget`. The reference's head may have a width, dtype and bias of its
    own; it is a constant, and is not multiplied a second time unless a KL is differentiated.

    Args:
        hidden: [..., d] the policy's hidden states; float32, bfloat16, float16 or float64. Row t
            must hold the state that `token_ids[..., t]` was sampled from:
            `model.model(ids).last_hidden_state[:, prompt - 1 : -1]` of a Hugging Face causal LM,
            with `token_ids = ids[:, prompt:]`.
        weight: [V, d] of the policy's head; the same dtypes, not necessarily that of `hidden`. An
            adapter on the head (LoRA) is not in its weight: pass the sum with the adapter's.
        ref_hidden: [..., ref_d] the reference's hidden states of the same tokens; must not require
            grad.
        ref_weight: [V, ref_d] of the reference's head, over the same vocabulary; must not require
            grad. (A head that policy and reference share: pass `weight.detach()`.)
        token_ids: [...] int64 or int32, in [0, V) where the mask is True.
        mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it is 0
            are skipped, and give 0. Finding the other rows synchronises a GPU. None: all rows
            count.
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
            rank's rows, hidden states and token ids are the same on all ranks. Backward takes one
            collective, to sum the gradient of the hidden states. None: the heads are whole.
        vocab_start: with a group, the global token id of this rank's first row. None: all shards
            are of one size, and in the order of the ranks.
        row_index: [n] int64 or int32 positions of the rows that count in the flattened ones,
            `mask.flatten().nonzero()[:, 0]`, with the mask or in its place: nobody then waits for
            a GPU, and a CUDA graph can be captured. None: they are looked for.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        TokenKL(logprob, ref_logprob, kl, forward_kl, entropy), each [...], in nats, float32
        (float64 for float64 heads); all but ref_logprob differentiable with respect to hidden,
        weight and bias.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or
            memory_budget is too small for any tile.

    Examples:
        >>> import torch, kl_kernels
        >>> weight = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> hidden, ref_hidden = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.0]])
        >>> out = kl_kernels.linear_token_kl(
        ...     hidden, weight, ref_hidden, weight.detach(), torch.tensor([1])
        ... )
        >>> round(out.kl.item(), 4), round(out.ref_logprob.item(), 4)
        (0.1109, -0.6931)
    """
    options = prepare_heads(
        hidden,
        weight,
        bias,
        ref_hidden,
        ref_weight,
        ref_bias,
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
        backend=backend,
    )
    reference = as_rows(ref_hidden), ref_weight, ref_bias
    return TokenKL(*_apply(hidden, weight, bias, reference, token_ids, mask, row_index, options))


def _apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    token_ids: Tensor,
    mask: Tensor | None,
    row_index: Tensor | None,
    options: HeadOptions,
) -> list[Tensor]:
    check_per_token("token_ids", token_ids, hidden)
    checks.check_token_dtype(token_ids)
    ids = as_tokens(token_ids).long()
    counts, which = prepare_which(mask, row_index, hidden)
    if options.group is None:
        # Kernels see a tile's own ids; one that is in no tile would pass for one elsewhere.
        checks.check_token_range(ids, counts, weight.shape[0])
    heads = *as_autocast(as_rows(hidden), weight, bias), *as_autocast(*reference)
    outputs = PartitionedKL.apply(LinearHeads(options), ids, which, *heads)
    return [shaped(output, token_ids.shape) for output in outputs]
