"""Linear heads whose weight is a DTensor: FSDP2's parameters, tensor parallelism, replicas.

Which of them it is, the hidden states say.

Plain hidden states are of this rank's own tokens (data parallelism: FSDP2, HSDP, replicas). Weight
and bias, of any placements, are gathered from all of their mesh, and held so until backward. Their
gradients are the mean over the mesh's ranks, placed as they are: what FSDP2 makes of the gradients
of `model(ids).logits`. Ranks that hold the same tokens, as where a mesh has a dimension for tensor
parallelism, leave that mean as it is. Everything else is plain, and so are the outputs.

DTensor hidden states are on the weight's mesh, and on each of its dimensions

    weight Replicate, hidden Replicate or Shard of rows     each rank has all of the head
    weight Shard(0), hidden Replicate                       the vocabulary is sharded

Gradients are those of one loss over all ranks, summed over the ranks that rows are sharded over.
What is per token, and outputs, are as for DTensor logits (`dtensors.py`).

The loss of `linear_policy_loss` is, with plain hidden states, that of this rank's own tokens: pass
`denominator=global_denominator(mask)`, and the mean of the gradients is that of one loss over all
ranks' tokens. (Held until backward are then not the gathered parameters, but gradients as large.)
With DTensor hidden states it is that one loss, as of DTensor logits: a DTensor, or plain where
token ids are; metrics are plain. `denominator` is then of all ranks' rows, and None counts them.

Bias and the reference's head are placed as the weight, its hidden states as the policy's.
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
from kl_kernels.functional.dtensor_losses import Loss, loss_of_all_rows

if TYPE_CHECKING:  # half a second of import, for those who use it
    from torch.distributed.tensor import DTensor, Placement

P = ParamSpec("P")
R = TypeVar("R")

HIDDEN = ("hidden", "ref_hidden")
PARAMETERS = ("weight", "bias", "ref_weight", "ref_bias")


def takes_dtensor_heads(function: Callable[P, R]) -> Callable[P, R]:
    """`function(hidden, weight, ...)`, called on plain tensors where some are DTensors.

    Raises:
        TypeError, ValueError: placements are none of those above, plain tensors and DTensors are
            mixed otherwise, or `group` or `vocab_start` is given.
    """
    return _called_on_local(function, _per_token)


def loss_takes_dtensor_heads(function: Callable[P, Loss]) -> Callable[P, Loss]:
    """`takes_dtensor_heads` for a loss, which is of all rows where hidden states are DTensors.

    Raises:
        TypeError, ValueError: as there, or ranks have parts of sequences that the aggregation must
            know whole.
    """
    return _called_on_local(function, loss_of_all_rows)


def _per_token(
    function: Callable[..., Any], layout: Layout, given: dict[str, Any], local: dict[str, Any]
) -> Any:
    result = function(**local, **layout.shard())
    if "token_ids" in given and not is_dtensor(given["token_ids"]):
        return result
    if isinstance(result, Tensor):
        return layout.per_token(result)
    return type(result)(*map(layout.per_token, result))


def _called_on_local(
    function: Callable[P, R],
    call: Callable[..., Any],  # (function, layout of the logits, arguments, local ones)
) -> Callable[P, R]:
    signature = inspect.signature(function)

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(map(is_dtensor, (*args, *kwargs.values()))):
            return function(*args, **kwargs)
        given = signature.bind(*args, **kwargs).arguments
        if given.get("group") is not None or given.get("vocab_start") is not None:
            name = next(name for name, value in given.items() if is_dtensor(value))
            raise ValueError(
                f"group and vocab_start are for plain tensors, but {name} is a DTensor"
            )
        if not is_dtensor(given["hidden"]):
            return function(**_gathered(given))  # type: ignore[call-arg]
        if given.get("row_index") is not None:
            raise ValueError(
                "row_index is for plain tensors, but hidden is a DTensor; pass the mask alone"
            )
        layout = _layout_of_head(given["hidden"], given["weight"])
        local = {name: _local(layout, given["weight"], name, x) for name, x in given.items()}
        result: R = call(function, layout, given, local)
        return result

    return wrapper


def check_reduced(name: str, parameter: Tensor) -> None:
    """A `full_tensor()` says by itself that each rank's gradient is that of all ranks' tokens.

    Raises:
        ValueError: `parameter` is one, and requires grad: of each rank's gradient, its own rows
            would be kept and the others dropped.
    """
    if torch.compiler.is_compiling():  # nobody can look at a graph that is being traced
        return
    spec = getattr(parameter.grad_fn, "dtensor_spec", None)
    if spec is None or getattr(parameter.grad_fn, "grad_placements", None) is not None:
        return
    if spec.mesh.size() > 1 and all(p.is_replicate() for p in spec.placements):
        raise ValueError(
            f"{name} is the full_tensor() of a DTensor, whose gradient would not be reduced over "
            f"the ranks; pass the DTensor itself (or, to reduce it otherwise, "
            f"full_tensor(grad_placements=...))"
        )


def _gathered(given: dict[str, Any]) -> dict[str, Any]:
    """Apply the head to hidden states that are this rank's own."""
    from torch.distributed.tensor import Partial, Replicate

    gathered = dict(given)
    for name, value in given.items():
        if not is_dtensor(value):
            continue
        if name not in PARAMETERS:
            raise TypeError(
                f"{name} is a DTensor, but hidden is a plain tensor, of this rank's own tokens; "
                f"pass {name}.to_local(), or hidden as a DTensor too"
            )
        if any(p.is_partial() for p in value.placements):
            raise ValueError(
                f"{name} has placements {value.placements}; accepted: Replicate and Shard"
            )
        mesh = value.device_mesh
        everywhere, own = [Replicate()] * mesh.ndim, [Partial()] * mesh.ndim
        gathered[name] = _Local.apply(value, everywhere, own, mesh.size())
    return gathered


def _layout_of_head(hidden: DTensor, weight: Any) -> Layout:
    """The layout of the logits, which is also how each argument must lie."""
    from torch.distributed.tensor import Replicate, Shard

    if not is_dtensor(weight):
        raise TypeError(
            f"weight is a {type(weight).__name__}, but hidden is a DTensor; weight must be one on "
            f"the same mesh (distribute_tensor), or hidden plain: hidden.to_local()"
        )
    if weight.device_mesh != hidden.device_mesh:
        raise ValueError(
            f"weight is on {weight.device_mesh}, hidden on {hidden.device_mesh}; they must be on "
            f"one mesh, or hidden plain: hidden.to_local()"
        )
    vocab = Shard(hidden.ndim - 1)
    placements: list[Placement] = []
    for of_hidden, of_weight in zip(hidden.placements, weight.placements):
        replicated = type(of_hidden) is Replicate
        rows = type(of_hidden) is Shard and of_hidden != vocab
        if type(of_weight) is Replicate and (replicated or rows):
            placements.append(of_hidden)
        elif type(of_weight) is Shard and of_weight.dim == 0 and replicated:
            placements.append(vocab)
        else:
            raise ValueError(
                f"hidden has placements {hidden.placements} and weight {weight.placements}; "
                "accepted on each mesh dimension: weight Replicate and hidden Replicate or Shard "
                "of rows, or weight Shard(0), the vocabulary, and hidden Replicate; redistribute "
                "one of them, or pass hidden.to_local() if each rank has tokens of its own"
            )
    shape = torch.Size((*hidden.shape[:-1], weight.shape[0]))
    return layout_of("hidden", hidden, tuple(placements), shape)


def _local(layout: Layout, weight: DTensor, name: str, value: Any) -> Any:
    from torch.distributed.tensor import Partial

    if value is None:
        return None
    if name in HIDDEN:
        return layout.placed(name, value, layout.given.placements).to_local()
    if name not in PARAMETERS:
        return layout.of_rows(name, value)
    placements = weight.placements
    parameter = layout.placed(name, value, placements)
    if parameter.shape[:1] != weight.shape[:1]:  # their parts may agree on some of the ranks
        raise ValueError(
            f"{name} has shape {tuple(parameter.shape)}, weight {tuple(weight.shape)}; the first "
            "dimension, the vocabulary, must be equal"
        )
    parts = [Partial() if i in layout.row_dims else p for i, p in enumerate(placements)]
    return _Local.apply(parameter, placements, parts, 1)


class _Local(torch.autograd.Function):
    """This rank's part of a DTensor once it is redistributed; its gradient is reduced at once.

    (`to_local(grad_placements=...)` would leave a parameter's `grad` unreduced, of placements
    Partial.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: DTensor,
        placements: list[Placement],
        grad_placements: list[Placement],
        divisor: int,  # gradient
    ) -> Tensor:
        ctx.placements, ctx.grad_placements, ctx.divisor = x.placements, grad_placements, divisor
        ctx.mesh, ctx.shape, ctx.stride = x.device_mesh, x.shape, x.stride()
        local: Tensor = x.redistribute(placements=placements).to_local()
        return local

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        from torch.distributed.tensor import DTensor

        # A sum over many ranks may be too large for float16 where their mean is not.
        wide = grad.float() if grad.dtype == torch.float16 else grad
        parts = DTensor.from_local(
            wide, ctx.mesh, ctx.grad_placements, run_check=False, shape=ctx.shape, stride=ctx.stride
        )
        mean = parts.redistribute(placements=ctx.placements) / ctx.divisor
        return mean.to(grad.dtype), None, None, None
