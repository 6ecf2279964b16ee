"""Layout of DTensor logits on their mesh, and this rank's part of each argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.checks import is_dtensor

if TYPE_CHECKING:  # half a second of import, for those who use it
    from torch.distributed.tensor import DTensor, Placement


class Layout(NamedTuple):
    """The placements of logits that are there, or that hidden states and a head would make."""

    name: str  # name of the argument that the others follow
    given: DTensor  # that argument
    shape: torch.Size  # shape of the logits, [..., V]
    vocab_dim: int | None  # the mesh dimension over which the vocabulary is sharded
    rows: tuple[Placement, ...]  # placements of everything per token

    @property
    def row_dims(self) -> list[int]:
        """The mesh dimensions over which rows are sharded."""
        return [i for i, p in enumerate(self.rows) if p.is_shard()]

    def shard(self) -> dict[str, Any]:
        """`group` and `vocab_start` of this rank's part of the vocabulary, where it is one."""
        if self.vocab_dim is None:
            return {}
        mesh = self.given.device_mesh
        size = _shard_size(self.shape[-1], mesh.size(self.vocab_dim))
        return {
            "group": mesh.get_group(self.vocab_dim),
            "vocab_start": size * mesh.get_local_rank(self.vocab_dim),
        }

    def of_rows(self, name: str, value: Any) -> Any:
        """This rank's part of what is per token; what is no tensor, or one number, as it is."""
        if not isinstance(value, Tensor) or (value.ndim == 0 and not is_dtensor(value)):
            return value
        if not is_dtensor(value) and not self.row_dims:
            return value
        if name == "cu_seqlens":
            raise ValueError(
                f"cu_seqlens is given, but {self.name} has placements {self.given.placements}; "
                "packed sequences must be whole on each rank: pass cu_seqlens as a plain tensor, "
                f"and {self.name} with no rows sharded, or its to_local() of this rank's sequences"
            )
        if any(self.rows[i].dim >= value.ndim for i in self.row_dims):  # type: ignore[attr-defined]
            raise ValueError(
                f"{self.name} has placements {self.given.placements}, which split sequences, but "
                f"{name} is one value per sequence; gather the sequences first"
            )
        local: Tensor = self.placed(name, value, self.rows).to_local()
        return local

    def placed(self, name: str, value: Any, placements: tuple[Placement, ...]) -> DTensor:
        """`value`, which must be a DTensor of those placements."""
        if not is_dtensor(value):
            raise TypeError(
                f"{name} is a {type(value).__name__}, but {self.name} is a DTensor; {name} must be "
                f"one with placements {placements}"
            )
        mesh = self.given.device_mesh
        if value.device_mesh != mesh or value.placements != placements:
            raise ValueError(
                f"{name} has placements {value.placements} on {value.device_mesh}; {self.name} of "
                f"placements {self.given.placements} on {mesh} needs {placements} on the same mesh"
            )
        of_mesh: DTensor = value
        return of_mesh

    def per_token(self, output: Tensor) -> DTensor:
        """[...] or [..., K] of all rows, from those that are here."""
        from torch.distributed.tensor import DTensor

        leading = self.shape[:-1]
        shape = torch.Size((*leading, *output.shape[len(leading) :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            output, self.given.device_mesh, self.rows, run_check=False, shape=shape, stride=stride
        )


def layout_of(
    name: str, given: DTensor, placements: tuple[Placement, ...], shape: torch.Size
) -> Layout:
    """The layout of logits of those placements and that shape, checked."""
    from torch.distributed.tensor import Replicate, Shard

    last = len(shape) - 1
    vocab_dims = [i for i, p in enumerate(placements) if p == Shard(last)]
    # The type itself: a strided shard's rows are in another order than its ranks.
    if len(vocab_dims) > 1 or any(type(p) not in (Replicate, Shard) for p in placements):
        raise ValueError(
            f"{name} has placements {placements}; accepted on each mesh dimension: "
            f"Replicate, Shard of rows, and once at most Shard({last}), the vocabulary"
        )
    for dim in vocab_dims:
        n_ranks = given.device_mesh.size(dim)
        if _shard_size(shape[-1], n_ranks) * (n_ranks - 1) >= shape[-1]:
            raise ValueError(
                f"{name} has a vocabulary of {shape[-1]} over {n_ranks} ranks, which "
                "leaves a rank without; shard it over fewer"
            )
    rows = tuple(Replicate() if i in vocab_dims else p for i, p in enumerate(placements))
    return Layout(name, given, shape, vocab_dims[0] if vocab_dims else None, rows)


def _shard_size(vocab_size: int, n_ranks: int) -> int:
    """The size of all shards but the last, as torch.chunk cuts them."""
    return -(-vocab_size // n_ranks)
