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
from kl_kernels.arguments import as_rows, as_tokens, shaped
from kl_kernels.dtensor_heads import takes_dtensor_heads
from kl_kernels.functional import TokenKL, TokenStats
from kl_kernels.linear_arguments import (
    as_mask,
    check_head,
    check_per_token,
    check_scale,
    checked_budget,
    reference_options,
    scaled,
    shard,
)
from kl_kernels.linear_autograd import LinearTokenKL, Options
from kl_kernels.tiles import untraced

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


@untraced
@takes_dtensor_heads
def linear_token_stats(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    token_ids: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # [...]
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats` of the logits of a linear head, which are never there in full.

    logits = logit_scale (hidden @ weight.T + bias); softcap and temperature follow as in
    `token_stats`. Products are computed and summed in float32 whatever the dtypes, under autocast
    too, and gradients are rounded to the dtype of their tensor once, at the end. (Float32 factors
    are multiplied as precisely as `torch.set_float32_matmul_precision` says.)

    Rows where the mask is False are not multiplied: their outputs and gradients are exactly 0, even
    if the row holds NaN. To know which those are, a GPU is waited for.

    Memory, beyond inputs, outputs and gradients: `memory_budget`; in backward also the gradient of
    the hidden states in float32, where they have another dtype or rows are masked.

    Args:
        hidden: the head's input; float32, bfloat16, float16 or float64.
        weight: of the head; the same dtypes, not necessarily that of `hidden`.
        token_ids: int64 or int32, in [0, V) where the mask is True.
        bias: of the head.
        mask: bool or numeric; rows where it is 0 are skipped. None: no row is.
        temperature: divides the logits; finite and above 0.
        softcap: Gemma-style soft cap applied after `logit_scale` and before the temperature.
        logit_scale: multiplies the logits (Cohere; 1 / logits_scaling for Granite); above 0.
        memory_budget: bytes for tiles and for copies of their factors in float32; None: 64 MiB on
            a CPU, 512 MiB elsewhere. The results are the same up to rounding.
        group: the process group that the vocabulary is sharded over, as in `token_stats`: weight
            and bias are this rank's rows, hidden states are the same on all ranks. Backward takes
            one collective, to sum the gradient of the hidden states. None: the head is whole.
        vocab_start: with a group, the global token id of this rank's first row; see `token_stats`.
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        TokenStats(logprob, entropy), each [...], in nats, differentiable in any mix with respect
        to hidden, weight and bias. What does not require a gradient costs none: a frozen head is
        not differentiated.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or
            memory_budget is too small for any tile.
    """
    check_head("", hidden, weight, bias)
    check_scale("", temperature, softcap, logit_scale)
    options = Options(
        *(temperature / logit_scale,) * 2, *(scaled(softcap, logit_scale),) * 2,
        checked_budget(memory_budget, hidden), backend, shard(weight, group, vocab_start),
    )  # fmt: skip
    outputs = _apply(hidden, weight, bias, (None, None, None), token_ids, mask, options)
    return TokenStats(outputs[0], outputs[4])


@untraced
@takes_dtensor_heads
def linear_token_kl(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    ref_hidden: Tensor,  # [..., ref_d]
    ref_weight: Tensor,  # [V, ref_d]
    token_ids: Tensor,  # [...]
    *,
    bias: Tensor | None = None,  # [V]
    ref_bias: Tensor | None = None,  # [V]
    mask: Tensor | None = None,  # [...]
    temperature: float = 1.0,
    ref_temperature: float | None = None,
    softcap: float | None = None,
    ref_softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float | None = None,
    memory_budget: int | None = None,
    group: ProcessGroup | None = None,
    vocab_start: int | None = None,
    backend: str | None = None,
) -> TokenKL:
    """`token_kl` of the logits of two linear heads, which are never there in full.

    See `token_kl` for what is computed and `linear_token_stats` for how and in which memory. The
    reference's head may have a width, dtype and bias of its own; it is a constant, and is not
    multiplied a second time unless a KL is differentiated.

    Args:
        hidden: the policy's; see `linear_token_stats`.
        weight: of the policy's head.
        ref_hidden: the reference's hidden states, of the same tokens; must not require grad.
        ref_weight: of the reference's head, over the same vocabulary; must not require grad. (A
            head that policy and reference share: pass `weight.detach()`.)
        token_ids: int64 or int32, in [0, V) where the mask is True.
        bias: of the policy's head.
        ref_bias: of the reference's head; None: none, whatever the policy's.
        mask: bool or numeric; rows where it is 0 are skipped. None: no row is.
        temperature: of the policy; finite and above 0.
        ref_temperature: of the reference; None: the policy's.
        softcap: of the policy, None: none.
        ref_softcap: of the reference; None: none, whatever the policy's.
        logit_scale: of the policy; see `linear_token_stats`.
        ref_logit_scale: of the reference; None: the policy's.
        memory_budget: see `linear_token_stats`; for the tiles of both.
        group: see `linear_token_stats`.
        vocab_start: see `linear_token_stats`.
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        TokenKL(logprob, ref_logprob, kl, forward_kl, entropy), each [...], in nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range, or
            memory_budget is too small for any tile.
    """
    options = reference_options(
        hidden, weight, bias, ref_hidden, ref_weight, ref_bias, temperature=temperature,
        ref_temperature=ref_temperature, softcap=softcap, ref_softcap=ref_softcap,
        logit_scale=logit_scale, ref_logit_scale=ref_logit_scale, memory_budget=memory_budget,
        group=group, vocab_start=vocab_start, backend=backend,
    )  # fmt: skip
    reference = as_rows(ref_hidden), ref_weight, ref_bias
    return TokenKL(*_apply(hidden, weight, bias, reference, token_ids, mask, options))


def _apply(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference: tuple[Tensor | None, Tensor | None, Tensor | None],
    token_ids: Tensor,
    mask: Tensor | None,
    options: Options,
) -> list[Tensor]:
    check_per_token("token_ids", token_ids, hidden)
    checks.check_token_dtype(token_ids)
    ids = as_tokens(token_ids).long()
    counts = as_mask(mask, hidden)
    if options.shard is None:
        # Kernels see a tile's own ids; one that is in no tile would pass for one elsewhere.
        checks.check_token_range(ids, counts, weight.shape[0])
    outputs = LinearTokenKL.apply(as_rows(hidden), weight, bias, *reference, ids, counts, options)
    return [shaped(output, token_ids.shape) for output in outputs]
