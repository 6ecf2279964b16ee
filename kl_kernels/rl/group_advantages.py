"""Advantages of answers over the others to the same prompt: GRPO and its kin, without a critic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.checks import (
    check_choice,
    check_integer,
    check_like,
    check_non_negative,
    check_plain,
    check_tensor,
    check_token_dtype,
    first_true,
    values_are_at_hand,
)
from kl_kernels.rl.collectives import from_all_ranks, n_ranks_of, sum_over_ranks
from kl_kernels.schemas import output_dtype

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

GroupAdvantage = Literal["grpo", "dr_grpo", "rloo", "reinforce++"]


def group_advantages(
    scores: Tensor,  # [B]
    *,
    group_size: int | None = None,
    group_ids: Tensor | None = None,  # [B]
    kind: GroupAdvantage = "grpo",
    eps: float = 1e-4,
    group: ProcessGroup | None = None,
) -> Tensor:
    """The advantage of each answer over the others of its group, those to the same prompt.

        "grpo"         (score - mean) / (std + eps)
        "dr_grpo"      score - mean
        "rloo"         score - mean of the group's others = n / (n - 1) (score - mean)
        "reinforce++"  (score - mean) / (std of score - mean over the whole batch + eps)

    with mean, std and n of the group, and Bessel's correction in every std. GRPO: Shao et al. 2024,
    arXiv 2402.03300, section 4.1.2, who name neither eps nor a correction; TRL has 1e-4 and the
    correction, verl 1e-6 and the correction. Dr. GRPO: Liu et al. 2025, arXiv 2503.20783. RLOO:
    Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740. REINFORCE++ with its baseline of the
    group: Hu 2025, arXiv 2501.03262, where the batch is one of sequences here (of tokens in verl
    and OpenRLHF, so that long answers weigh more); the one without the baseline is "grpo" of a
    single group, the batch.

    A group of equal scores has advantages of exactly 0, even where their mean would round, and so
    has a group of one: there is nothing to compare. (verl leaves it its score.)

    Sums are float64, of differences to the smallest score of the group: an offset of all scores
    costs no digits.

    Args:
        scores: [B] any real dtype, finite (looked at on a CPU alone). On a GPU a NaN or an infinity
            leaves nothing finite in its group, nor with "reinforce++" in others, but for zeros.
        group_size: answers to each prompt, 1 or above: groups are consecutive, and B is a multiple.
            Nobody waits for a GPU.
        group_ids: [B] int64 or int32, any numbers: answers with the same one are a group, wherever
            they are. Either this or group_size.
        kind: "grpo", "dr_grpo", "rloo" or "reinforce++".
        eps: added to the std, in units of the score; 0 or above. "dr_grpo" and "rloo" have none.
        group: ranks that share the batch, each with B of its own, 0 too. With group_ids a
            group may be spread over them: scores and ids are gathered, and B waited for. With
            group_size each rank's groups are whole, and only "reinforce++" has something to sum.
            A rank that fails leaves the others to the timeout. None: this process alone.

    Returns:
        [B] float32 (float64 for float64 scores), without gradient. Expand it over the tokens:
        `advantages[:, None].expand_as(mask)`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range, or neither or
            both of group_size and group_ids are given.

    Examples:
        >>> import torch, kl_kernels
        >>> scores = torch.tensor([1.0, 0.0, 0.5, 0.5])
        >>> kl_kernels.group_advantages(scores, group_size=2, kind="rloo")
        tensor([ 1., -1.,  0.,  0.])
        >>> ids = torch.tensor([7, 3, 7, 3])
        >>> kl_kernels.group_advantages(scores, group_ids=ids, kind="dr_grpo")
        tensor([ 0.2500, -0.2500, -0.2500,  0.2500])
    """
    check_choice("kind", kind, get_args(GroupAdvantage))
    eps = check_non_negative("eps", eps)
    _check_scores(scores)
    if (group_size is None) == (group_ids is None):
        given = "neither" if group_size is None else "both"
        raise ValueError(f"group_size and group_ids: {given} given; pass one of the two")
    if group is not None:
        n_ranks_of(group)
    x = scores.detach().double()
    own = slice(None)
    if group_ids is None:
        groups = _consecutive(x, check_integer("group_size", group_size, 1))
    else:
        check_like("group_ids", group_ids, "scores", scores)
        check_token_dtype(group_ids, "group_ids")
        ids = group_ids.long()
        if group is not None:
            x, ids, own = _gathered(x, ids, group)
        groups = _of_ids(ids)
        group = None  # all of its answers are here
    advantages = _advantages(x, groups, kind, eps, group)
    return advantages[own].to(output_dtype(scores))


class _Groups(NamedTuple):
    """The group of each answer, numbers below `bound`, which may be more than there are."""

    of_answer: Tensor  # [B] int64
    bound: int

    def sums(self, x: Tensor) -> Tensor:  # [B] -> [B], each answer has its group's
        return x.new_zeros(self.bound).index_add(0, self.of_answer, x)[self.of_answer]

    def least(self, x: Tensor) -> Tensor:  # [B] -> [B]
        unset = x.new_zeros(self.bound)
        return unset.scatter_reduce(0, self.of_answer, x, "amin", include_self=False)[
            self.of_answer
        ]


def _check_scores(scores: Tensor) -> None:
    check_tensor("scores", scores)
    check_plain("scores", scores)
    if scores.ndim != 1:
        raise ValueError(f"scores has shape {tuple(scores.shape)}; it must be [B]")
    if not values_are_at_hand(scores):
        return
    at = first_true(~scores.detach().double().isfinite())
    if at is not None:
        raise ValueError(f"scores holds {scores[at].item()} at index {at}; it must be finite")


def _consecutive(x: Tensor, size: int) -> _Groups:
    if len(x) % size:
        raise ValueError(
            f"group_size is {size}, which does not divide the {len(x)} scores; pass group_ids for "
            "groups of several sizes, or ones that are spread over ranks"
        )
    return _Groups(torch.arange(len(x), device=x.device) // size, len(x) // size)


def _of_ids(ids: Tensor) -> _Groups:
    """Number the groups in the order of their ids: `unique` would wait for a GPU."""
    ascending, order = ids.sort()
    is_new = torch.zeros_like(ids)
    is_new[1:] = ascending[1:] != ascending[:-1]
    return _Groups(torch.empty_like(ids).scatter(0, order, is_new.cumsum(0)), len(ids))


def _gathered(x: Tensor, ids: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, slice]:
    """Every rank's scores and ids, in the order of ranks, and where this rank's own lie."""
    sizes = from_all_ranks(torch.tensor(len(x), device=x.device), group).tolist()
    rank = dist.get_rank(group)
    before = sum(sizes[:rank])
    padding = (0, max(sizes) - len(x))

    def whole(own: Tensor) -> Tensor:
        rows = from_all_ranks(torch.nn.functional.pad(own, padding), group)
        return torch.cat([row[:size] for row, size in zip(rows, sizes)])

    return whole(x), whole(ids), slice(before, before + sizes[rank])


def _advantages(
    x: Tensor,  # [B] float64
    groups: _Groups,
    kind: str,
    eps: float,
    group: ProcessGroup | None,
) -> Tensor:  # [B] float64
    n = groups.sums(torch.ones_like(x))
    shifted = x - groups.least(x)  # equal scores are 0, and so is their mean
    centered = shifted - groups.sums(shifted) / n
    if kind == "dr_grpo":
        return centered
    if kind == "rloo":
        return centered * (n / (n - 1).clamp_min(1))
    squares = centered.square()
    if kind == "grpo":
        total = groups.sums(squares)
    else:
        both = torch.stack([squares.sum(), x.new_full((), float(len(x)))])
        total, n = both if group is None else sum_over_ranks(both, group)
    std = (total / (n - 1).clamp_min(1)).sqrt()
    return torch.where(centered == 0, 0.0, centered / (std + eps))
