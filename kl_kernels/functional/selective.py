"""Log-probabilities of chosen tokens, one or several at each position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import (
    as_rows,
    as_tokens,
    prepare_mask,
    prepare_policy,
    shaped,
)
from kl_kernels.functional.dtensors import takes_dtensors
from kl_kernels.functional.logits import token_stats
from kl_kernels.functional.support import Support
from kl_kernels.ops.autograd import LATER, once, only_first
from kl_kernels.schemas import (
    BackendName,
    Execution,
    TokenStatsArgs,
    TokenStatsBackwardArgs,
    output_dtype,
)

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


def selective_log_softmax(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...] or [..., K]
    temperature: float = 1.0,
    row_mask: Tensor | None = None,  # [...]
    *,
    support: Support | None = None,
    backend: BackendName | None = None,
) -> Tensor:
    """Log-probabilities of `index` under softmax(logits / temperature), with TRL's signature.

    One token per position is `token_stats(...).logprob`. Several, such as a teacher's top K, cost
    no further pass: logits are read once, and in backward once more.

    Args:
        logits: [..., V] float32, bfloat16, float16 or float64. Row t must hold the logits that the
            tokens of `index[..., t]` are judged by: `model(ids).logits[:, :-1]` of a causal LM for
            `ids[:, 1:]`.
        index: [...] or [..., K] int64 or int32, in [0, V) where the mask is True; the K of a
            position may repeat.
        temperature: divides the logits; finite and above 0.
        row_mask: [...] bool, or numbers that are 0 or 1 (looked at on a CPU alone); rows where it
            is 0 give 0 and have no gradient. None: all rows count.
        support: as in `token_stats`; with one token per position alone.
        backend: "cuda", "triton", "cpu" or "reference". None: the best one that takes the tensors.

    Returns:
        Log-probabilities in the shape of `index`, in nats, differentiable; float32 (float64 for
        float64 logits).

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.log(torch.tensor([[0.5, 0.25, 0.25]]))
        >>> kl_kernels.selective_log_softmax(logits, torch.tensor([[0, 2]])).exp().tolist()
        [[0.5, 0.25]]
    """
    checks.check_tensor("logits", logits)
    checks.check_tensor("index", index)
    if index.ndim < logits.ndim:
        return _sampled(logits, index, temperature, row_mask, support, backend)
    if support is not None:
        raise ValueError(
            f"support is given, but index of shape {tuple(index.shape)} chooses several tokens per "
            "position; with a support it must choose one"
        )
    return _selected(logits, index, temperature, row_mask, backend)


@takes_dtensors
def _sampled(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [...]
    temperature: float,
    row_mask: Tensor | None,  # [...]
    support: Support | None,
    backend: BackendName | None,
    group: ProcessGroup | None = None,  # the group of DTensors that shard the vocabulary
    vocab_start: int | None = None,
) -> Tensor:
    mask = prepare_mask(row_mask, logits, "row_mask")
    checks.check_per_token("index", index, logits)
    checks.check_token_dtype(index, "index")
    if group is None:
        checks.check_token_range(as_tokens(index), mask, logits.shape[-1], "index")
    stats = token_stats(
        logits,
        index,
        row_mask,
        temperature=temperature,
        support=support,
        group=group,
        vocab_start=vocab_start,
        backend=backend,
    )
    return stats.logprob


@takes_dtensors
def _selected(
    logits: Tensor,  # [..., V]
    index: Tensor,  # [..., K]
    temperature: float,
    row_mask: Tensor | None,  # [...]
    backend: BackendName | None,
) -> Tensor:
    mask = prepare_mask(row_mask, logits, "row_mask")
    checks.refuse_transforms("selective_log_softmax of several tokens per position")
    models = prepare_policy(logits, temperature, None)
    check_several("index", index, logits)
    rows = as_rows(index)
    kept = rows if mask is None else rows.masked_fill(~mask[..., None], 0)
    checks.check_token_range(kept, None, logits.shape[-1], "index")
    selected = _SelectedLogprobs.apply(
        models.logits, kept.long(), mask, models.temperature, backend
    )
    return shaped(selected, index.shape)


def check_several(name: str, ids: Tensor, logits: Tensor) -> None:
    """`ids` must hold K tokens at each position of the logits."""
    checks.check_same_kind(name, ids, "logits", logits)
    if ids.shape[:-1] != logits.shape[:-1] or ids.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}; logits of shape {tuple(logits.shape)} need "
            f"{tuple(logits.shape[:-1])} and, to choose several tokens, K >= 1 behind it"
            + checks.shift_advice(name, ids.shape[:-1], "logits", logits.shape[:-1])
        )
    checks.check_token_dtype(ids, name)
    checks.check_device(name, ids, logits)


class _SelectedLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature)[index], [B, T, K].

    The kernels know one token per row. The others' log-probabilities are that one's plus the
    differences of the logits, which lose nothing however far the logits are from 0; and the
    gradient differs from that of one token in K entries.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,  # [B, T, V]
        index: Tensor,  # [B, T, K]
        mask: Tensor | None,  # [B, T]
        temperature: float,
        backend: str | None,
    ) -> Tensor:
        chosen = logits.gather(-1, index).to(output_dtype(logits))
        # The likeliest: from -inf there is no difference to anything.
        first, where = chosen.max(-1, keepdim=True)
        token_ids = index.gather(-1, where)[..., 0]
        args = TokenStatsArgs(logits.detach(), token_ids, mask, temperature, softcap=None)
        execution = Execution(inplace_backward=False, backend=backend)
        logprob, entropy, state = torch.ops.kl_kernels.token_stats(*args, *execution)
        gap = torch.where(chosen == -torch.inf, -torch.inf, (chosen - first) / temperature)
        logprobs = logprob[..., None] + gap
        if mask is not None:
            logprobs = torch.where(mask[..., None], logprobs, 0.0)
        ctx.options = temperature, backend
        ctx.save_for_backward(logits, index, mask, token_ids, state, entropy, logprobs)
        return logprobs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        logits, index, mask, token_ids, state, entropy, logprobs = ctx.saved_tensors
        temperature, backend = ctx.options
        with torch.no_grad():
            total = grad.sum(-1)
            *args, _ = TokenStatsBackwardArgs(
                grad_logprob=total,
                grad_entropy=None,
                logits=logits,
                token_ids=token_ids,
                mask=mask,
                policy_state=state,
                entropy=entropy,
                temperature=temperature,
                softcap=None,
                part=False,
                grad_logits=LATER,
            )
            gradient = torch.ops.kl_kernels.token_stats_backward(*args, backend)
            own = sum_over_equals(index, grad) - logprobs.exp() * total[..., None]
            if mask is not None:
                own = torch.where(mask[..., None], own, 0.0)
            put(gradient, index, (own / temperature).to(gradient.dtype))
        return only_first(ctx, once(gradient, logits))


def put(
    rows: Tensor,  # [B, T, V], contiguous
    ids: Tensor,  # [B, T, K]
    values: Tensor,  # [B, T, K]
) -> None:
    """`scatter_` of a few entries, which on a CPU costs as much as a pass."""
    flat, k = rows.view(-1, rows.shape[-1]), ids.shape[-1]
    which = torch.arange(len(flat), device=rows.device)[:, None]
    flat.index_put_((which, ids.reshape(-1, k)), values.reshape(-1, k))


def sum_over_equals(ids: Tensor, values: Tensor) -> Tensor:  # [..., K] each
    """At each place, the sum of the values at all places of the row that hold the same id."""
    ordered, order = ids.sort(-1)
    is_new = ordered[..., 1:] != ordered[..., :-1]
    run = torch.nn.functional.pad(is_new.cumsum(-1), (1, 0))
    sums = torch.zeros_like(values).scatter_add_(-1, run, values.gather(-1, order))
    return torch.empty_like(values).scatter_(-1, order, sums.gather(-1, run))
