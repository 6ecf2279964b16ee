"""Prepare the arguments of the functions on linear heads: checks, scales, memory budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.functional.arguments import as_tokens, needs_gradient
from kl_kernels.functional.dtensor_heads import check_reduced
from kl_kernels.partitioned.heads import HeadOptions
from kl_kernels.partitioned.products import GRADIENT_PRECISIONS, GradientPrecision
from kl_kernels.partitioned.shards import check_no_vocab_start, shard_of
from kl_kernels.schemas import BackendName

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

# Bytes of memory_budget=None. On a CPU the tile that was just multiplied is then still in its last
# cache when the kernels read it: from 16 to 64 MiB the time is flat, at 256 MiB it is a tenth more
# (bench.cpu.linear --budget). A GPU needs tiles of thousands of rows and columns to be busy, and
# few enough of them that launching the kernels of a tile takes no longer than running them; that
# figure is a guess, which no GPU has confirmed.
MEMORY_BUDGETS = {"cpu": 64 << 20, "cuda": 512 << 20}


def default_memory_budget(device: torch.device) -> int:
    return MEMORY_BUDGETS.get(device.type, MEMORY_BUDGETS["cuda"])


def sharding(
    weight: Tensor, group: ProcessGroup | None, vocab_start: int | None
) -> tuple[str | None, int]:
    """The last options of `HeadOptions`."""
    if group is None:
        check_no_vocab_start(vocab_start)
        return None, 0
    shard = shard_of(len(weight), group, vocab_start)
    return group.group_name, shard.start


def scaled(softcap: float | None, logit_scale: float) -> float | None:
    """The c' = c / s of c tanh(s x / c) / T = c' tanh(x / c') / T'; and T' = T / s."""
    return None if softcap is None else softcap / logit_scale


def checked_budget(memory_budget: int | None, hidden: Tensor) -> int:
    if memory_budget is None:
        return default_memory_budget(hidden.device)
    return int(checks.check_positive("memory_budget", memory_budget))


def prepare_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    memory_budget: int | None,
    gradient_precision: GradientPrecision,
    group: ProcessGroup | None,
    vocab_start: int | None,
    backend: BackendName | None,
) -> HeadOptions:
    """Validate the policy's head, where there is no reference."""
    checks.check_choice("gradient_precision", gradient_precision, GRADIENT_PRECISIONS)
    check_head("", hidden, weight, bias)
    temperature, softcap, logit_scale = check_scale("", temperature, softcap, logit_scale)
    group_name, first_id = sharding(weight, group, vocab_start)
    return HeadOptions(
        temperature=temperature / logit_scale,
        ref_temperature=temperature / logit_scale,
        softcap=scaled(softcap, logit_scale),
        ref_softcap=None,
        memory_budget=checked_budget(memory_budget, hidden),
        gradient_precision=gradient_precision,
        backend=backend,
        group=group_name,
        vocab_start=first_id,
    )


def prepare_heads(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    *,
    temperature: float,
    ref_temperature: float | None,
    softcap: float | None,
    ref_softcap: float | None,
    logit_scale: float,
    ref_logit_scale: float | None,
    memory_budget: int | None,
    gradient_precision: GradientPrecision = "narrow",
    group: ProcessGroup | None,
    vocab_start: int | None,
    backend: BackendName | None,
) -> HeadOptions:
    """Validate both heads. Reference options left as None default to the policy's."""
    checks.check_choice("gradient_precision", gradient_precision, GRADIENT_PRECISIONS)
    check_head("", hidden, weight, bias)
    temperature, softcap, logit_scale = check_scale("", temperature, softcap, logit_scale)
    check_head("ref_", ref_hidden, ref_weight, ref_bias)
    ref_temperature, ref_softcap, ref_logit_scale = check_scale(
        "ref_",
        temperature if ref_temperature is None else ref_temperature,
        ref_softcap,
        logit_scale if ref_logit_scale is None else ref_logit_scale,
    )
    check_reference(hidden, weight, ref_hidden, ref_weight, ref_bias)
    group_name, first_id = sharding(weight, group, vocab_start)
    return HeadOptions(
        temperature=temperature / logit_scale,
        ref_temperature=ref_temperature / ref_logit_scale,
        softcap=scaled(softcap, logit_scale),
        ref_softcap=scaled(ref_softcap, ref_logit_scale),
        memory_budget=checked_budget(memory_budget, hidden),
        gradient_precision=gradient_precision,
        backend=backend,
        group=group_name,
        vocab_start=first_id,
    )


def as_autocast(*factors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast factors of several dtypes to the one that autocast multiplies in, where it is on."""
    present = [factor for factor in factors if factor is not None]
    if len({factor.dtype for factor in present}) < 2:
        return factors
    device = present[0].device.type
    if not torch.is_autocast_enabled(device):
        return factors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if factor is None else factor.to(dtype) for factor in factors)


class Which(NamedTuple):
    """The rows that count."""

    mask: Tensor | None  # [B, T] bool; None: all, or nobody can look
    rows: Tensor | None  # the mask, or [n] positions in the flattened tokens


def prepare_which(mask: Tensor | None, row_index: Tensor | None, hidden: Tensor) -> Which:
    """Check the mask, [...], and the positions that may be given beside it or in its place."""
    if mask is not None:
        check_per_token("mask", mask, hidden)
        mask = as_tokens(checks.check_mask("mask", mask))
    if row_index is None:
        return Which(mask, mask)
    checks.check_tensor("row_index", row_index)
    checks.check_same_kind("row_index", row_index, "hidden", hidden)
    checks.check_same_device("row_index", row_index, "hidden", hidden)
    checks.check_token_dtype(row_index, "row_index")
    if row_index.ndim != 1:
        raise ValueError(f"row_index has shape {tuple(row_index.shape)}; it must be [n]")
    index = row_index.long()
    if checks.values_are_at_hand(row_index):
        mask = _mask_of(index, mask, hidden.shape[:-1])
    return Which(mask, index)


def _mask_of(index: Tensor, mask: Tensor | None, shape: torch.Size) -> Tensor:
    """The mask that the positions say, which must be the one that is given."""
    n = shape.numel()
    outside = (index < 0) | (index >= n)
    if outside.any():
        raise ValueError(
            f"row_index holds {int(index[outside][0])}; accepted: 0 to {n - 1}, positions in the "
            f"flattened rows of hidden"
        )
    times = index.bincount(minlength=n)
    if (times > 1).any():
        raise ValueError(
            f"row_index holds {int(times.argmax())} twice; it must hold each position once"
        )
    found = as_tokens((times == 1).view(shape))
    if mask is not None and not torch.equal(found, mask):
        raise ValueError(
            "row_index and mask differ in which rows count; row_index must be "
            "mask.flatten().nonzero()[:, 0]"
        )
    return found


def check_head(prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    checks.refuse_transforms("a function of linear heads")
    names = f"{prefix}hidden", f"{prefix}weight", f"{prefix}bias"
    for name, tensor in zip(names, (hidden, weight) if bias is None else (hidden, weight, bias)):
        checks.check_floating(name, tensor)
        checks.check_same_kind(name, tensor, names[0], hidden)
        checks.check_same_device(name, tensor, names[0], hidden)
        if tensor is not hidden:
            check_reduced(name, tensor)
    if hidden.ndim == 0:
        raise ValueError(f"{names[0]} has shape (); it must be [..., d]")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{names[1]} has shape {tuple(weight.shape)}; {names[0]} of shape "
            f"{tuple(hidden.shape)} needs [V, {hidden.shape[-1]}] with at least one row"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{names[2]} has shape {tuple(bias.shape)}; {names[1]} of shape "
            f"{tuple(weight.shape)} needs ({weight.shape[0]},)"
        )


def check_scale(
    prefix: str, temperature: float, softcap: float | None, logit_scale: float
) -> tuple[float, float | None, float]:
    """The three as Python floats."""
    temperature = checks.check_positive(f"{prefix}temperature", temperature)
    logit_scale = checks.check_positive(f"{prefix}logit_scale", logit_scale)
    if softcap is not None:
        softcap = checks.check_positive(f"{prefix}softcap", softcap)
    return temperature, softcap, logit_scale


def check_reference(
    hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, ref_bias: Tensor | None
) -> None:
    if ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden has shape {tuple(ref_hidden.shape)}, hidden {tuple(hidden.shape)}; "
            "all but the last dimension must be equal"
        )
    if ref_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"ref_weight has {ref_weight.shape[0]} rows, weight {weight.shape[0]}; "
            "they must be equal (slice both to the vocabulary they share)"
        )
    checks.check_same_kind("ref_hidden", ref_hidden, "hidden", hidden)
    checks.check_same_device("ref_hidden", ref_hidden, "hidden", hidden)
    for name, tensor in (
        ("ref_hidden", ref_hidden),
        ("ref_weight", ref_weight),
        ("ref_bias", ref_bias),
    ):
        if tensor is not None and needs_gradient(tensor):
            raise ValueError(
                f"{name} requires grad, but the reference is a constant: "
                "detach it, or compute it under torch.no_grad()"
            )


def check_per_token(name: str, tensor: Tensor, hidden: Tensor) -> None:
    checks.check_tensor(name, tensor)
    checks.check_same_kind(name, tensor, "hidden", hidden)
    if tensor.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; hidden of shape {tuple(hidden.shape)} "
            f"needs {tuple(hidden.shape[:-1])}"
            + checks.shift_advice(name, tensor.shape, "hidden", hidden.shape[:-1])
        )
    checks.check_same_device(name, tensor, "hidden", hidden)
