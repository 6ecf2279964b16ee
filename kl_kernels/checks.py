"""Argument checks. Each failure names the argument, its value and what is accepted.

(No math.isfinite here: torch.compile cannot trace it.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from kl_kernels import transforms

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; accepted: {', '.join(map(repr, choices))}")


def check_number(name: str, value: object) -> None:
    """Comparing what is no number would fail in words that name no argument."""
    if isinstance(value, (int, float)):  # torch.compile knows these alone
        return
    if isinstance(value, Real) or (isinstance(value, Tensor) and value.ndim == 0):
        return
    raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it has to be a number")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it has to be a finite number above 0")


def check_finite(name: str, value: float) -> None:
    check_number(name, value)
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} is {value}; it has to be a finite number")


def check_non_negative(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} is {value}; it has to be a finite number, 0 or above")


def check_unit_interval(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}; accepted: 0 to 1")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; it has to be a torch.Tensor")
    if value.is_complex():  # torch would drop the imaginary part, and warn at most
        raise TypeError(f"{name} has dtype {value.dtype}; it has to be real")


def check_like(name: str, tensor: Tensor, like_name: str, like: Tensor) -> None:
    """`tensor` has to be a tensor with the shape and device of `like`."""
    check_tensor(like_name, like)
    check_tensor(name, tensor)
    if tensor.shape != like.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, {like_name} {tuple(like.shape)}; "
            "they have to be equal"
        )
    check_same_device(name, tensor, like_name, like)


def check_batch(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if tensor.ndim != 2:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it has to be [B, T]")


def check_per_sequence(name: str, tensor: Tensor, batch_name: str, batch: Tensor) -> None:
    """`tensor` has to be [B] where `batch` is [B, T], on the same device."""
    check_tensor(name, tensor)
    if tensor.shape != batch.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {batch_name} of shape {tuple(batch.shape)} "
            f"needs {tuple(batch.shape[:1])}"
        )
    check_same_device(name, tensor, batch_name, batch)


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
    transforms.check_no_tangent(name, logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} has shape {tuple(logits.shape)}; it has to be [..., V] with at least one logit"
        )


def check_per_token(name: str, tensor: Tensor, logits: Tensor) -> None:
    """`tensor` has to be [...] where `logits` is [..., V], on the same device."""
    check_tensor(name, tensor)
    if tensor.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; logits of shape {tuple(logits.shape)} "
            f"need {tuple(logits.shape[:-1])}"
            + shift_advice(name, tensor.shape, "logits", logits.shape[:-1])
        )
    check_device(name, tensor, logits)


def shift_advice(name: str, shape: torch.Size, rows_name: str, rows: torch.Size) -> str:
    """What to slice where T alone differs, and by one: [..., T] of `name` beside [..., T] rows."""
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
    """Whether looking costs no waiting for a GPU and no graph break; under vmap nobody can."""
    is_plain = not (torch.compiler.is_compiling() or transforms.are_active())
    return tensor.device.type == "cpu" and is_plain


def check_token_range(
    token_ids: Tensor, mask: Tensor | None, vocab_size: int, name: str = "token_ids"
) -> None:
    """Token ids that count have to lie in [0, V)."""
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
