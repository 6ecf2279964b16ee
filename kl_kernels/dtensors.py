"""DTensor logits: sharded over the vocabulary, over rows, over both (two mesh dimensions), or none.

Every rank calls the function on its own part of each argument; the group and the place of its
shard follow from the logits' placements. `ref_logits` has to be placed as `logits`. Everything
per token is a DTensor placed as the logits are but replicated where they shard the vocabulary, or,
where no rows are sharded, a plain tensor, the same on all ranks. Outputs are what `token_ids` is:
DTensors of its placements, or plain tensors; without token ids they are DTensors. The logits'
gradient is a DTensor placed as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:  # half a second of import, for those who use it
    from torch.distributed.tensor import DTensor, Placement

P = ParamSpec("P")
R = TypeVar("R")


def takes_dtensors(function: Callable[P, R]) -> Callable[P, R]:
    """`function(logits, ..., group, vocab_start)`, called on local tensors if logits is a DTensor.

    Raises:
        TypeError, ValueError: a DTensor's placements are none of those above.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not _is_dtensor(args[0] if args else kwargs.get("logits")):
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        layout = _layout_of(given["logits"])
        if given.get("group") is not None or given.get("vocab_start") is not None:
            raise ValueError("group and vocab_start are for plain tensors, but logits is a DTensor")
        local = {name: layout.local(name, value) for name, value in given.items()}
        result: Any = function(**local, **layout.shard())  # type: ignore[call-arg]
        if "token_ids" in given and not _is_dtensor(given["token_ids"]):
            return result
        if isinstance(result, Tensor):
            return layout.per_token(result)  # type: ignore[return-value]
        return type(result)(*map(layout.per_token, result))

    return wrapper


def _is_dtensor(value: object) -> bool:
    return type(value) is not Tensor and hasattr(value, "device_mesh")


class _Layout(NamedTuple):
    """How logits lie on their mesh."""

    logits: DTensor
    vocab_dim: int | None  # the mesh dimension over which the vocabulary is sharded
    rows: tuple[Placement, ...]  # of what is per token

    def shard(self) -> dict[str, Any]:
        if self.vocab_dim is None:
            return {}
        mesh = self.logits.device_mesh
        size = _shard_size(self.logits.shape[-1], mesh.size(self.vocab_dim))
        return {
            "group": mesh.get_group(self.vocab_dim),
            "vocab_start": size * mesh.get_local_rank(self.vocab_dim),
        }

    def local(self, name: str, value: Any) -> Any:
        if name in ("logits", "ref_logits"):
            return self._placed(name, value, self.logits.placements)
        if not isinstance(value, Tensor):
            return value
        if not _is_dtensor(value) and all(p.is_replicate() for p in self.rows):
            return value
        if any(p.is_shard() and p.dim >= value.ndim for p in self.rows):  # type: ignore[attr-defined]
            raise ValueError(
                f"logits has placements {self.logits.placements}, which split sequences, but "
                f"{name} is one value per sequence; gather the sequences first"
            )
        return self._placed(name, value, self.rows)

    def _placed(self, name: str, value: Any, placements: tuple[Placement, ...]) -> Tensor:
        if not _is_dtensor(value):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but logits is a DTensor; {name} has to be "
                f"one with placements {placements}"
            )
        if value.device_mesh != self.logits.device_mesh or value.placements != placements:
            raise ValueError(
                f"{name} has placements {value.placements} on {value.device_mesh}; logits of "
                f"placements {self.logits.placements} on {self.logits.device_mesh} need "
                f"{placements} on the same mesh"
            )
        local: Tensor = value.to_local()
        return local

    def per_token(self, output: Tensor) -> DTensor:  # of the rows that are here
        from torch.distributed.tensor import DTensor

        shape = self.logits.shape[:-1]
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            output, self.logits.device_mesh, self.rows, run_check=False, shape=shape, stride=stride
        )


def _layout_of(logits: DTensor) -> _Layout:
    from torch.distributed.tensor import Replicate, Shard

    last = logits.ndim - 1
    vocab_dims = [i for i, p in enumerate(logits.placements) if p == Shard(last)]
    # The type itself: a strided shard's rows are in another order than its ranks.
    if len(vocab_dims) > 1 or any(type(p) not in (Replicate, Shard) for p in logits.placements):
        raise ValueError(
            f"logits has placements {logits.placements}; accepted on each mesh dimension: "
            f"Replicate, Shard of rows, and once at most Shard({last}), the vocabulary"
        )
    for dim in vocab_dims:
        n_ranks = logits.device_mesh.size(dim)
        if _shard_size(logits.shape[-1], n_ranks) * (n_ranks - 1) >= logits.shape[-1]:
            raise ValueError(
                f"logits has a vocabulary of {logits.shape[-1]} over {n_ranks} ranks, which "
                "leaves a rank without; shard it over fewer"
            )
    rows = tuple(Replicate() if i in vocab_dims else p for i, p in enumerate(logits.placements))
    return _Layout(logits, vocab_dims[0] if vocab_dims else None, rows)


def _shard_size(vocab_size: int, n_ranks: int) -> int:
    """Of all shards but the last, as torch.chunk cuts them."""
    return -(-vocab_size // n_ranks)
