"""Every operation that a call runs, on tensors without data: shapes, dtypes, FLOP, bytes, waits.

A meta tensor stands for one on a GPU: the functions take the path that they take there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kl_kernels.partitioned.operators import IMPLEMENTATIONS

# They make another tensor of the same memory, or memory alone.
FREE = frozenset(
    {
        *("alias", "as_strided", "detach", "diagonal", "empty", "empty_like", "empty_strided"),
        *(
            "expand",
            "new_empty",
            "new_empty_strided",
            "permute",
            "scalar_tensor",
            "select",
            "slice",
        ),
        *("split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view"),
        *("_unsafe_view", "_reshape_alias", "lift_fresh", "lift_fresh_copy"),
    }
)
PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm"})
ONLY_WRITE = frozenset({"arange", "fill_", "full", "new_zeros", "ones", "ones_like", "zero_"}) | {
    *("zeros", "zeros_like"),
}
# The host waits for their result.
WAITS = frozenset({"_local_scalar_dense", "is_nonzero", "item", "nonzero"})
# Kernels of an operator of this package, where they are not one; and passes over its logits, where
# they are not one: the second is from the end of each row back, and mostly in the cache. States
# of ranks, and what they are states of, lie apart and are copied before they are read.
LAUNCHES = {
    **dict.fromkeys(("fold_part", "fold_tail", "token_stats", "token_kl", "kl_rewards"), 2),
    "finish_parts": 3,
}
PASSES = {"token_jsd": 2, "policy_loss": 2, "finish_parts": 3}


@dataclass(frozen=True)
class Operation:
    """One call of an operator."""

    op: str
    shapes: tuple[tuple[int, ...], ...]  # the tensors it takes
    operand_dtype: str  # the largest tensor's
    result_dtype: str
    flops: int  # matrix products'
    bytes: int  # read and written
    launches: int
    host_syncs: int
    is_ours: bool


class Ledger(TorchDispatchMode):
    """Records the operations that run inside, in order.

    Args:
        share: of the elements of a mask, whose values nobody knows, that are True.
    """

    def __init__(self, share: float = 1.0) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._share = share

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        namespace, name = func._schema.name.split("::")
        kwargs = kwargs or {}
        with self:  # look into what is made of other operations
            if namespace == "kl_kernels" and name in IMPLEMENTATIONS:
                return IMPLEMENTATIONS[name](*args)
            if (parts := func.decompose(*args, **kwargs)) is not NotImplemented:
                return parts
        if name == "nonzero":  # no data, no number of rows
            result: Any = _rows_that_count(args[0], self._share)
        else:
            result = func(*args, **kwargs)
        if name not in FREE:
            self.operations.append(_operation(namespace, name, func, args, kwargs, result))
        return result


def _rows_that_count(mask: Tensor, share: float) -> Tensor:
    n = int(mask.numel() * share)
    return torch.empty((n, mask.ndim), dtype=torch.int64, device=mask.device)


def _operation(
    namespace: str,
    name: str,
    func: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    result: Any,
) -> Operation:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    taken = list({id(t): t for t in given}.values())  # out= may be an operand, too
    twice = {id(t) for t in given if sum(t is other for other in given) > 1}
    written = _written(func, args, kwargs) or [
        t for t in tree_leaves(result) if isinstance(t, Tensor)
    ]
    ours = namespace == "kl_kernels"
    read = [
        t
        for t in taken
        if not any(t is w for w in written) or _is_read(name, ours) or (ours and id(t) in twice)
    ]
    size = sum(map(n_bytes, written))
    if name not in ONLY_WRITE:
        size += sum(PASSES.get(name, 1) * n_bytes(t) if ours else n_bytes(t) for t in read)
    if name in ("embedding_dense_backward", "gather", "index", "index_select"):
        size = 2 * sum(map(n_bytes, written))
    if name == "index_add_":  # rows that are added to, and no others
        size = 3 * n_bytes(taken[-1])
    if name == "index_put_":  # the places that are named, not all of the tensor
        size = sum(n_bytes(t) for t in taken if not any(t is w for w in written))
        size += n_bytes(args[2])
    if name == "scale_gradient":  # the factor is 1, and nothing else is touched
        size = 0
    largest = max(taken, key=n_bytes, default=None)
    return Operation(
        op=name,
        shapes=tuple(tuple(t.shape) for t in taken),
        operand_dtype=_dtype(_operands(name, taken)[0] if name in PRODUCTS else largest),
        result_dtype=_dtype(written[0] if written else None),
        flops=_flops(name, taken),
        bytes=size,
        launches=LAUNCHES.get(name, 1),
        host_syncs=int(name in WAITS),
        is_ours=ours,
    )


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Arguments that the operator writes."""
    given = dict(zip((a.name for a in func._schema.arguments), args)) | dict(kwargs)
    return [
        given[a.name]
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write and given.get(a.name) is not None
    ]


def _is_read(name: str, ours: bool) -> bool:
    """Whether what an operator writes is read before."""
    return not ours and name not in ("copy_", "mm", "sub")  # the latter two where out= is given


def n_bytes(tensor: Tensor) -> int:
    """Bytes of the memory, in which an expanded row lies once."""
    n = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        n *= size if stride else 1
    return n * tensor.element_size()


def _operands(name: str, taken: Sequence[Tensor]) -> Sequence[Tensor]:
    first = 1 if name in ("addmm", "addmm_", "baddbmm") else 0
    return taken[first : first + 2]


def _flops(name: str, taken: Sequence[Tensor]) -> int:
    if name not in PRODUCTS:
        return 0
    a, b = _operands(name, taken)
    return 2 * a.numel() * int(b.shape[-1])


def _dtype(tensor: Tensor | None) -> str:
    return "" if tensor is None else str(tensor.dtype).removeprefix("torch.")
