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

import torch
from torch import Tensor

from kl_kernels.checks import is_dtensor
from kl_kernels.functional.dtensor_layout import Layout, layout_of
from kl_kernels.rl.losses import count

if TYPE_CHECKING:  # half a second of import, for those who use it
    from torch.distributed.tensor import DTensor, Placement

P = ParamSpec("P")
R = TypeVar("R")
Loss = tuple[Tensor, dict[str, Tensor]]

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
        local = _local(layout, given)
        aggregation = given.get("aggregation", "token-mean")
        _check_whole_sequences(layout, aggregation)
        if layout.row_dims and given.get("denominator") is None:
            whole_mask = given["mask"].full_tensor().bool()
            local["denominator"] = count(whole_mask, aggregation).clamp_min(1)
        loss, metrics = function(**local)  # type: ignore[call-arg]
        if not is_dtensor(given["token_ids"]):
            return loss, metrics
        return _summed(layout, loss), _of_all_rows(layout, metrics, local["mask"])

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


def _check_whole_sequences(layout: Layout, aggregation: str) -> None:
    splits = any(layout.rows[i].dim != 0 for i in layout.row_dims)  # type: ignore[attr-defined]
    if splits and aggregation in ("seq-mean-token-mean", "seq-mean-token-sum-norm"):
        raise ValueError(
            f"logits has placements {layout.given.placements}, which split sequences, but "
            f"aggregation {aggregation!r} weighs a token by the length of its own; gather the "
            "sequences first, or shard the rows by sequences: Shard(0)"
        )


def _summed(layout: Layout, x: Tensor, how: str = "sum") -> DTensor:
    """Over the ranks that rows are sharded over; the same on all of them."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh = layout.given.device_mesh
    placements: list[Placement] = [Replicate()] * mesh.ndim
    parts = [Partial(how) if i in layout.row_dims else p for i, p in enumerate(placements)]
    return DTensor.from_local(x, mesh, parts, run_check=False).redistribute(placements=placements)


def _of_all_rows(layout: Layout, metrics: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Means over the tokens of all ranks' rows, from those over the tokens here."""
    if not layout.row_dims:
        return metrics
    means = [name for name in metrics if name != "ratio_max"]
    n_here = mask.bool().sum()
    sums = torch.stack([n_here.double(), *(n_here * metrics[name].double() for name in means)])
    n, *totals = _summed(layout, sums).to_local().unbind()
    dtype = metrics["ratio_max"].dtype
    of_all = {name: (total / n.clamp_min(1)).to(dtype) for name, total in zip(means, totals)}
    return of_all | {"ratio_max": _summed(layout, metrics["ratio_max"], "max").to_local()}
