"""A loss of DTensors: one over all ranks' rows, from those of the rows that each rank has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_kernels.checks import is_dtensor
from kl_kernels.functional.dtensor_layout import Layout
from kl_kernels.rl.losses import count
from kl_kernels.rl.sequences import sequences_of

if TYPE_CHECKING:  # half a second of import, for those who use it
    from torch.distributed.tensor import DTensor, Placement

Loss = tuple[Tensor, dict[str, Tensor]]


def loss_of_all_rows(
    function: Callable[..., Loss], layout: Layout, given: dict[str, Any], local: dict[str, Any]
) -> Loss:
    """The loss and metrics that `function` gives of all rows, the same on all ranks.

    Args:
        function: a loss with `token_ids`, `mask`, `aggregation` and `denominator`.
        layout: of the logits, or of those that a head would make.
        given: the arguments by name.
        local: this rank's parts of them.

    Raises:
        ValueError: ranks have parts of sequences that the aggregation must know whole.
    """
    aggregation = given.get("aggregation", "token-mean")
    _check_whole_sequences(layout, aggregation)
    if layout.row_dims and given.get("denominator") is None:
        whole_mask = given["mask"].full_tensor().bool()
        sequences = sequences_of("mask", whole_mask, None)
        local = local | {"denominator": count(whole_mask, aggregation, sequences).clamp_min(1)}
    loss, metrics = function(**local, **layout.shard())
    if not is_dtensor(given["token_ids"]):
        return loss, metrics
    return _summed(layout, loss), _of_all_rows(layout, metrics, local["mask"])


def _check_whole_sequences(layout: Layout, aggregation: str) -> None:
    splits = any(layout.rows[i].dim != 0 for i in layout.row_dims)  # type: ignore[attr-defined]
    if splits and aggregation in ("seq-mean-token-mean", "seq-mean-token-sum-norm"):
        raise ValueError(
            f"{layout.name} has placements {layout.given.placements}, which split sequences, but "
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
