"""The output layer of verl's fused kernels, by `linear_token_stats`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

from kl_kernels.checks import check_choice
from kl_kernels.functional.hidden import linear_token_stats

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

REDUCTIONS = ("none", "sum", "mean")


def linear_cross_entropy(
    hidden: Tensor,  # [..., d]
    weight: Tensor,  # [V, d]
    labels: Tensor,  # [...]
    temperature: float = 1.0,
    reduction: Literal["none", "sum", "mean"] = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies, as verl.utils.kernel.linear_cross_entropy of verl 0.9.

    Despite that name log-probabilities are returned, not their negatives. Here any device, dtype
    and width will do, and gradients are summed up in float32 and rounded once. verl's kernel and
    this one multiply as many matrices: four with the gradients of both factors.

    Args:
        hidden: [..., d] hidden states.
        weight: [V, d] of the output layer; with a group, this rank's rows.
        labels: [...] tokens to score, in [0, V) of the whole vocabulary; integers.
        temperature: divides the logits; finite and above 0.
        reduction: "none", or "sum" or "mean" of the log-probabilities.
        dist_process_group: the ranks that the vocabulary is sharded over, in equal parts and in the
            order of the ranks. As with verl, what follows must sum the gradient of the hidden
            states over the ranks; each holds an equal share of it, where verl's hold that of their
            own rows. None: the output layer is whole.

    Returns:
        (logprobs, entropy): [N] for the N tokens of any shape, float32 (float64 for float64 heads),
        or [] with a reduction; and [N], in nats.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range.

    Examples:
        >>> import torch
        >>> from kl_kernels.integrations.verl import linear_cross_entropy
        >>> hidden, weight = torch.zeros(1, 3, 2), torch.ones(4, 2)
        >>> logprobs, entropy = linear_cross_entropy(hidden, weight, torch.tensor([[0, 1, 3]]))
        >>> [round(x, 4) for x in logprobs.tolist()], round(entropy[0].item(), 4)
        ([-1.3863, -1.3863, -1.3863], 1.3863)
    """
    reduction = reduction.lower()  # type: ignore[assignment]
    check_choice("reduction", reduction, REDUCTIONS)
    if dist_process_group is not None and hidden.requires_grad:
        ranks = dist_process_group.size()
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda gradient: gradient / ranks)
    logprobs, entropy = linear_token_stats(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        labels.reshape(-1),
        temperature=temperature,
        group=dist_process_group,
    )
    if reduction == "none":
        return logprobs, entropy
    return (logprobs.sum() if reduction == "sum" else logprobs.mean()), entropy
