"""Argument checks. Each failure names the argument, its value and what is accepted.

(No math.isfinite here: torch.compile cannot trace it.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from types import FrameType

import torch
from torch import Tensor
from torch.autograd import forward_ad

MOST_BY_ROUNDING = 0.01  # a log-probability above 0, in nats
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {_shown(value)}; accepted: {', '.join(map(repr, choices))}")


def check_number(name: str, value: object) -> float:
    """`value` as a Python float: kernels, JSON and torch's operators each take those alone.

    Accepted are Python's and numpy's numbers and 0-dim tensors and arrays, but no bool, which in
    the place of a number is a mistake. Reading a tensor on a GPU waits for it.
    """
    if type(value) is float:  # nearly always; of the rest torch.compile traces an int
        return value
    number = value if type(value) is int else unboxed(name, value)
    if isinstance(number, bool) or not isinstance(number, (int, Real)):
        raise TypeError(f"{name} is {_shown(value)}, a {type(value).__name__}; it must be a number")
    try:
        return float(number)
    except OverflowError:
        raise ValueError(f"{name} is larger than any float; it must be a number") from None


def check_measured(name: str, value: object) -> float:
    """`check_number` of something measured, which may come with the graph that it came out of."""
    return check_number(name, value.detach() if isinstance(value, Tensor) else value)


def check_positive(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number above 0")
    return number


def check_finite(name: str, value: object) -> float:
    number = check_number(name, value)
    if not -math.inf < number < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number")
    return number


def check_non_negative(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number, 0 or above")
    return number


def check_unit_interval(name: str, value: object) -> float:
    number = check_number(name, value)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} is {value}; accepted: 0 to 1")
    return number


def check_integer(name: str, value: object, at_least: int | None = None) -> int:
    """`value` as a Python int: Python's, numpy's, or of a 0-dim tensor or array of integers."""
    number = unboxed(name, value)
    if isinstance(number, bool) or not isinstance(number, Integral):
        raise TypeError(
            f"{name} is {_shown(value)}, a {type(value).__name__}; it must be an integer"
        )
    if at_least is not None and number < at_least:
        raise ValueError(f"{name} is {number}; it must be an integer, {at_least} or above")
    return int(number)


def unboxed(name: str, value: object) -> object:
    """Value in a 0-dim tensor or array, or in a numpy scalar; anything else as it is."""
    if not isinstance(value, Tensor):
        is_numpy = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
        return value.item() if is_numpy else value  # type: ignore[attr-defined]
    if value.ndim != 0:
        return value
    if value.is_meta:
        raise ValueError(f"{name} is on meta, where it has no value; it must be a number")
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires grad, but it gets none: pass {name}.detach()")
    return value.item()


def _shown(value: object) -> str:
    """In an error, where a tensor's or an array's thousands of elements help nobody."""
    if isinstance(value, Tensor) or hasattr(value, "dtype"):
        shape = tuple(getattr(value, "shape", ()))
        return f"of shape {shape} and dtype {value.dtype}"
    return repr(value)


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor")
    if value.is_complex():  # torch would drop the imaginary part, and warn at most
        raise TypeError(f"{name} has dtype {value.dtype}; it must be real")


def is_dtensor(value: object) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, which is not imported to find out."""
    return isinstance(value, Tensor) and type(value) is not Tensor and hasattr(value, "device_mesh")


def check_same_kind(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """DTensors and plain tensors do not mix: torch's operators refuse that and name neither."""
    if is_dtensor(tensor) != is_dtensor(other):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}, {other_name} a {type(other).__name__}; both "
            "must be DTensors, or both plain tensors"
        )


def check_plain(name: str, tensor: Tensor) -> None:
    """For what looks at a rank's own sequences, or at their number."""
    if is_dtensor(tensor):
        raise TypeError(
            f"{name} is a {type(tensor).__name__}; it must be a plain tensor, of this rank's own "
            "sequences: pass its to_local()"
        )


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` must be a tensor with the shape and device of `like`."""
    check_tensor(like_name, like)
    check_tensor(name, tensor)
    check_same_kind(name, tensor, like_name, like)
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, {like_name} {tuple(like.shape)}; "
            "they must be equal"
        )
    check_same_device(name, tensor, like_name, like)


def check_mask(name: str, mask: Tensor) -> Tensor:
    """`mask` as bool: True, or any number but 0, is a position that counts.

    On a CPU all numbers must be 0 or 1. An additive mask (0 and -inf) would count what it hides,
    and NaN, weights, token ids or the numbers of packed sequences mean something else. A GPU is not
    waited for.
    """
    check_tensor(name, mask)
    counts = mask.bool()
    if mask.dtype == torch.bool or not values_are_at_hand(mask):
        return counts
    as_given = counts.to(mask.dtype)
    if not torch.equal(as_given, mask):
        raise ValueError(
            f"{name} holds {mask[as_given != mask][0].item()}; it must hold True and False, or 1 "
            f"and 0, where 1 is a position that counts (an additive mask, of 0 and -inf, says the "
            f"opposite: pass {name} == 0)"
        )
    return counts


def check_state(state: object, owner: str, keys: Sequence[str]) -> None:
    """`state` must be what a `state_dict` of `owner` returned: {"class": owner} and `keys`."""
    if not isinstance(state, Mapping) or state.get("class") != owner:
        of = state.get("class", "no class") if isinstance(state, Mapping) else _shown(state)
        raise ValueError(f"state is of {of}; it must be what state_dict() of a {owner} returned")
    missing = [key for key in keys if key not in state]
    if missing:
        raise ValueError(f"state of {owner} has no {missing[0]!r}; it must have all of {keys}")


def check_logprobs(name: str, logprobs: Tensor, mask: Tensor) -> None:  # [...], [...] bool
    """Probabilities, none of which is below 0, are no log-probabilities, none of which is above.

    Rounding lifts a log-probability above 0 by little, and not those of all tokens.
    """
    if not values_are_at_hand(logprobs) or logprobs.numel() == 0:
        return
    kept = torch.where(mask, logprobs.detach().double(), 0.0)
    smallest, largest = (end.item() for end in kept.aminmax())
    if smallest >= 0 and largest > MOST_BY_ROUNDING:
        raise ValueError(
            f"{name} holds {largest:.3g}, and nothing below 0 where the mask is set; it "
            "must hold log-probabilities, which are 0 or below, not probabilities"
        )


def check_batch(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be [B, T]")


def check_per_sequence(name: str, tensor: Tensor, batch_name: str, batch: Tensor) -> None:
    """`tensor` must be [B] where `batch` is [B, T], on the same device."""
    check_tensor(name, tensor)
    check_same_kind(name, tensor, batch_name, batch)
    if tensor.shape != batch.shape[:1]:
        packed = batch.shape[0] == 1 and tensor.ndim == 1 and len(tensor) > 1
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {batch_name} of shape {tuple(batch.shape)} "
            f"needs {tuple(batch.shape[:1])}"
            + (
                ", one for each row (or pass cu_seqlens, where the row is packed sequences)"
                if packed
                else ""
            )
        )
    check_same_device(name, tensor, batch_name, batch)


def first_true(wrong: Tensor) -> int | None:  # [n] bool
    """The first place that is True, for an error about it; None where there is none."""
    return int(wrong.int().argmax()) if wrong.any() else None


def check_cu_seqlens(name: str, shape: torch.Size, cu_seqlens: Tensor) -> None:
    """`cu_seqlens` must say where the sequences of tokens of that shape begin and end."""
    check_tensor("cu_seqlens", cu_seqlens)
    check_token_dtype(cu_seqlens, "cu_seqlens")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be [S + 1] for S sequences"
        )
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise ValueError(
            f"{name} has shape {tuple(shape)}; with cu_seqlens it must be [N] or [1, N]"
        )
    n = shape[-1]
    if len(cu_seqlens) == 1 and n > 0:
        raise ValueError(
            f"cu_seqlens has shape (1,), which is no sequence, but {name} has {n} tokens"
        )
    if not values_are_at_hand(cu_seqlens):
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise ValueError(f"cu_seqlens begins with {first}; it must begin with 0")
    if last != n:
        raise ValueError(f"cu_seqlens ends with {last}; {name} of shape {tuple(shape)} needs {n}")
    at = first_true(cu_seqlens[1:] < cu_seqlens[:-1])
    if at is not None:
        raise ValueError(
            f"cu_seqlens falls from {int(cu_seqlens[at])} to {int(cu_seqlens[at + 1])} at index "
            f"{at + 1}; it must ascend"
        )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, {other_name} on {other.device}")


def check_floating(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.dtype not in LOGITS_DTYPES:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in LOGITS_DTYPES)
        raise TypeError(f"{name} has dtype {tensor.dtype}; accepted: {accepted}")


def check_logits(name: str, logits: Tensor) -> None:
    check_floating(name, logits)
    check_no_tangent(name, logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}; it must be [..., V] with at least one logit"
        )


def check_per_token(name: str, tensor: Tensor, logits: Tensor) -> None:
    """`tensor` must be [...] where `logits` is [..., V], on the same device."""
    check_tensor(name, tensor)
    check_same_kind(name, tensor, "logits", logits)
    if tensor.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; logits of shape {tuple(logits.shape)} "
            f"need {tuple(logits.shape[:-1])}"
            + shift_advice(name, tensor.shape, "logits", logits.shape[:-1])
        )
    check_device(name, tensor, logits)


def shift_advice(name: str, shape: torch.Size, rows_name: str, rows: torch.Size) -> str:
    """Advice on which slice to pass where T alone differs, and by one."""
    if len(shape) != len(rows) or not shape or shape[:-1] != rows[:-1]:
        return ""
    outer = ":, " * (len(shape) - 1)
    sliced = {1: f"{rows_name}[{outer}:-1]", -1: f"{name}[{outer}1:]"}.get(rows[-1] - shape[-1])
    if sliced is None:
        return ""
    return (
        f"; row t of a causal LM's {rows_name} predicts token t + 1, and the last row none of the "
        f"tokens: pass {sliced}"
    )


def check_device(name: str, tensor: Tensor, logits: Tensor) -> None:
    check_same_device(name, tensor, "logits are", logits)


def check_token_ids(token_ids: Tensor, logits: Tensor) -> None:
    check_per_token("token_ids", token_ids, logits)
    check_token_dtype(token_ids)


def check_token_dtype(token_ids: Tensor, name: str = "token_ids") -> None:
    if token_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} has dtype {token_ids.dtype}; accepted: int64, int32")


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether looking costs no waiting for a GPU or for other ranks, and no graph break.

    Under vmap nobody can look. A DTensor's values are spread over ranks.
    """
    is_plain = not (torch.compiler.is_compiling() or transforms_are_active() or is_dtensor(tensor))
    return tensor.device.type == "cpu" and is_plain


def check_token_range(
    token_ids: Tensor, mask: Tensor | None, vocab_size: int, name: str = "token_ids"
) -> None:
    """Token ids that count must lie in [0, V)."""
    if not values_are_at_hand(token_ids):
        return
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if mask is not None:
        outside &= mask
    if outside.any():
        raise ValueError(
            f"{name} holds {int(token_ids[outside][0])} at an unmasked position; "
            f"accepted: 0 to {vocab_size - 1}"
        )


def transforms_are_active() -> bool:
    """Whether a transform of `torch.func` is at work."""
    # Not public, but what torch.autograd.Function itself asks, and torch.compile knows it.
    active: bool = torch._C._are_functorch_transforms_active()
    return active


def refuse_transforms(name: str) -> None:
    """Otherwise torch would tell the user to change our source."""
    if transforms_are_active():
        raise NotImplementedError(
            f"{name} takes no transforms of torch.func (grad, vjp, jacrev, vmap); use "
            "torch.autograd, or token_stats, token_kl, token_jsd or kl_rewards, which do take them"
        )


def check_no_tangent(name: str, tensor: Tensor) -> None:
    """Operators that only know backward drop tangents: torch would call the derivative 0."""
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(tensor).tangent is not None:
        raise no_forward_mode(name)


def no_forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} carries a tangent, but kl_kernels has no forward-mode derivatives "
        "(torch.func.jvp, jacfwd, hessian); use backward"
    )


def callers_level() -> int:
    """The `stacklevel` of a warning, in the function that warns, at the nearest line outside.

    Outside is what is neither this package nor torch.

    Between the two may lie the dispatcher, autograd, or code that torch.compile has generated.
    """
    return _level_outside(sys._getframe(1))


def _level_outside(frame: FrameType) -> int:
    level = 1
    while (outer := frame.f_back) is not None and _is_inner(frame.f_globals.get("__name__")):
        frame, level = outer, level + 1
    return level


def _is_inner(module: str | None) -> bool:
    return module is None or module.partition(".")[0] in ("kl_kernels", "torch")
