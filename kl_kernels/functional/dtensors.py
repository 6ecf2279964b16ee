"""DTensor logits: sharded over the vocabulary, over rows, over both (two mesh dimensions), or none.

Every rank calls the function on its own part of each argument; the group and the place of its
shard follow from the logits' placements. `ref_logits` must be placed as `logits`. Everything
per token is a DTensor placed as the logits are but replicated where they shard the vocabulary, or,
where no rows are sharded, a plain tensor, the same on all ranks. Outputs are what `token_ids` (or
`index`, or `topk_ids`) is: DTensors of its placements, or plain tensors; without token ids they are
DTensors. The logits' gradient is a DTensor placed as they are.

`fused_policy_loss`, `topk_kl` and `selective_log_softmax` of several tokens need a row's whole
vocabulary on one rank, and refuse logits that shard it. The loss of `fused_policy_loss` is that of
all ranks' rows, its metrics are plain tensors, and both are the same on all ranks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor

from kl_kernels.checks import is_dtensor
from kl_kernels.functional.dtensor_layout import Layout, layout_of
from kl_kernels.functional.dtensor_losses import Loss, loss_of_all_rows

if TYPE_CHECKING:  # half a second of import, for those who use it
    from torch.distributed.tensor import DTensor

P = ParamSpec("P")
R = TypeVar("R")

LOGITS = ("logits", "ref_logits")
FOLLOWED = ("token_ids", "index", "topk_ids")  # outputs are DTensors, or plain, as these are


def takes_dtensors(function: Callable[P, R]) -> Callable[P, R]:
    """`function(logits, ...)`, called on local tensors if logits is a DTensor.

    If it takes `group` and `vocab_start`, the vocabulary may be sharded.

    Raises:
        TypeError, ValueError: a DTensor's placements are none of those above.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not is_dtensor(args[0] if args else kwargs.get("logits")):
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        layout = _layout_of_logits(given["logits"])
        if "group" not in signature.parameters:
            _check_whole_rows(layout)
        if given.get("group") is not None or given.get("vocab_start") is not None:
            raise ValueError("group and vocab_start are for plain tensors, but logits is a DTensor")
        result: Any = function(**_local(layout, given), **layout.shard())  # type: ignore[call-arg]
        if any(name in given and not is_dtensor(given[name]) for name in FOLLOWED):
            return result
        if isinstance(result, Tensor):
            return layout.per_token(result)  # type: ignore[return-value]
        return type(result)(*map(layout.per_token, result))

    return wrapper


def loss_takes_dtensors(function: Callable[P, Loss]) -> Callable[P, Loss]:
    """`fused_policy_loss` of all ranks' rows, from the loss of those that are here.

    Raises:
        TypeError, ValueError: a DTensor's placements are none of those above, or split sequences
            that the aggregation must know whole.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Loss:
        if not is_dtensor(args[0] if args else kwargs.get("logits")):
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        layout = _layout_of_logits(given["logits"])
        _check_whole_rows(layout)
        return loss_of_all_rows(function, layout, given, _local(layout, given))

    return wrapper


def _layout_of_logits(logits: DTensor) -> Layout:
    return layout_of("logits", logits, logits.placements, logits.shape)


def _local(layout: Layout, given: dict[str, Any]) -> dict[str, Any]:
    placements = layout.given.placements
    return {
        name: layout.placed(name, value, placements).to_local()
        if name in LOGITS and value is not None
        else layout.of_rows(name, value)
        for name, value in given.items()
    }


def _check_whole_rows(layout: Layout) -> None:
    if layout.vocab_dim is not None:
        raise ValueError(
            f"logits has placements {layout.given.placements}, which shard the vocabulary, but "
            "this function needs all of a row on one rank: pass logits.redistribute(placements="
            f"{[*layout.rows]}), or use token_stats or token_kl, which take shards"
        )
