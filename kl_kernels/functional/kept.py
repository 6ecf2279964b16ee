"""Prepare kept sets for the operator, and call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.algebra.segments import Segments
from kl_kernels.functional.support import Support
from kl_kernels.partitioned import kept_operators  # noqa: F401  registers the operators
from kl_kernels.partitioned.kept import KeptArgs, KeptOutputs
from kl_kernels.schemas import (
    Execution,
    KLRewardsArgs,
    PolicyLossArgs,
    TokenKLArgs,
    TokenStatsArgs,
)

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

RefSupport = Literal["same", "full"]


def check_ref_support(ref_support: str) -> None:
    checks.check_choice("ref_support", ref_support, get_args(RefSupport))


def kept_args(
    support: Support,
    a: TokenStatsArgs | TokenKLArgs | KLRewardsArgs | PolicyLossArgs,
    ref_support: RefSupport = "same",
) -> KeptArgs:
    """The operator's arguments on kept sets.

    Args:
        support: the sets, one for each of the `a.token_ids`.
        a: arguments of the operator on whole rows.
        ref_support: "same", or "full" for a reference over the whole vocabulary.

    Raises:
        TypeError, ValueError: the support is none, or does not go with the logits; on a CPU, too,
            one of its ids is no token, or a sampled token is not in its set.
    """
    checks.refuse_transforms("support")
    if not isinstance(support, Support):
        raise TypeError(f"support is a {type(support).__name__}; it must be a kl_kernels.Support")
    checks.check_device("support", support.token_ids, a.logits)
    if support.rows != a.token_ids.numel():
        raise ValueError(
            f"support has {support.rows} rows, token_ids {a.token_ids.numel()} tokens; each token "
            "needs a row, under the mask or not (one without entries will do)"
        )
    ids, offsets = support.token_ids.long(), support.offsets.long()
    _check_values(ids, offsets, a)
    ref_logits = getattr(a, "ref_logits", None)
    return KeptArgs(
        logits=a.logits,
        ref_logits=ref_logits,
        token_ids=a.token_ids,
        mask=a.mask,
        kept_ids=ids,
        offsets=offsets,
        ref_is_whole=ref_support == "full" and ref_logits is not None,
        temperature=a.temperature,
        ref_temperature=getattr(a, "ref_temperature", a.temperature),
        softcap=a.softcap,
        ref_softcap=getattr(a, "ref_softcap", None),
    )


def _check_values(
    ids: Tensor,  # [nnz]
    offsets: Tensor,  # [rows + 1]
    a: TokenStatsArgs | TokenKLArgs | KLRewardsArgs | PolicyLossArgs,
) -> None:
    if not checks.values_are_at_hand(ids):
        return
    vocab_size, row = a.logits.shape[-1], Segments.of(offsets, len(ids)).row
    at = checks.first_true(ids >= vocab_size)
    if at is not None:
        raise ValueError(
            f"support holds {int(ids[at])} in row {int(row[at])}; accepted: 0 to {vocab_size - 1}"
        )
    tokens = a.token_ids.flatten()
    missing = offsets.diff() > 0
    missing[row[ids == tokens[row]]] = False
    if a.mask is not None:
        missing &= a.mask.flatten()
    at = checks.first_true(missing)
    if at is not None:
        raise ValueError(
            f"token_ids holds {int(tokens[at])} in row {at}, which is not in the support of that "
            "row; a sampled token must be in the set that it was sampled from"
        )


def over_kept(
    support: Support,
    a: TokenStatsArgs | TokenKLArgs | KLRewardsArgs,
    execution: Execution,
    group: ProcessGroup | None,
    ref_support: RefSupport = "same",
) -> KeptOutputs:
    """The operator's results on kept sets; raises as `kept_args`, and of sharded vocabularies."""
    if group is not None:
        raise ValueError("support is given with a group; kept sets need all logits on each rank")
    args = kept_args(support, a, ref_support)
    return KeptOutputs(*torch.ops.kl_kernels.kept_kl(*args, *execution))
