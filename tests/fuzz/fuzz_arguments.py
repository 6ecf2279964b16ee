"""Hostile values for arguments, each with the required outcome of a call that holds it."""

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

REFUSED, VALID, ANY = "refused", "valid", "any"  # ANY: a result or a named refusal
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (
    torch.int64,
    torch.int8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


@dataclass(frozen=True)
class Hostile:
    value: Any
    expected: str
    how: str


def not_a_tensor(random_: random.Random) -> Hostile:
    value = random_.choice(["logits", 3, 1.5, [1.0], {}, object()])
    return Hostile(value, REFUSED, f"a {type(value).__name__}")


def layout(tensor: torch.Tensor, random_: random.Random) -> Hostile:
    """The same values, somewhere else in memory."""
    if tensor.ndim == 0:
        return Hostile(tensor.clone(), VALID, "copy")
    how = random_.choice(["column", "transposed", "wide rows", "offset"])
    if how == "column":
        beside = torch.full((*tensor.shape, 3), 77, dtype=tensor.dtype)
        beside[..., 1] = tensor
        return Hostile(beside[..., 1], VALID, how)
    if how == "transposed":
        return Hostile(tensor.transpose(0, -1).contiguous().transpose(0, -1), VALID, how)
    if how == "wide rows":
        beside = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), 77, dtype=tensor.dtype)
        beside[..., 2 : 2 + tensor.shape[-1]] = tensor
        return Hostile(beside[..., 2 : 2 + tensor.shape[-1]], VALID, how)
    beside = torch.full((tensor.numel() + 1,), 77, dtype=tensor.dtype)
    beside[1:] = tensor.reshape(-1)
    return Hostile(beside[1:].view(tensor.shape), VALID, how)


def shape(tensor: torch.Tensor, random_: random.Random) -> Hostile:
    how = random_.choice(["0-dim", "longer", "shorter", "extra dimension", "no dimension", "empty"])
    if how == "0-dim" or tensor.ndim == 0:
        return Hostile(tensor.new_zeros(()), ANY, how)
    where = random_.randrange(tensor.ndim)
    if how == "longer":
        return Hostile(torch.cat([tensor, tensor], where), ANY, f"{how} at {where}")
    if how == "shorter":
        return Hostile(tensor.narrow(where, 0, tensor.shape[where] // 2), ANY, f"{how} at {where}")
    if how == "extra dimension":
        return Hostile(tensor.unsqueeze(where), ANY, f"{how} at {where}")
    if how == "no dimension":
        return Hostile(tensor.sum(where).to(tensor.dtype), ANY, f"without {where}")
    return Hostile(tensor.narrow(where, 0, 0), ANY, f"{how} at {where}")


def dtype(tensor: torch.Tensor, random_: random.Random) -> Hostile:
    to = random_.choice(FLOATS + OTHER_DTYPES)
    # Complex and eight-bit numbers are accepted nowhere.
    return Hostile(tensor.to(to), ANY if to not in OTHER_DTYPES[3:4] else REFUSED, f"{to}")


def values(tensor: torch.Tensor, random_: random.Random) -> Hostile:
    tensor = tensor.clone()
    if tensor.is_floating_point():
        limits = torch.finfo(tensor.dtype)
        choices = [math.nan, math.inf, -math.inf, limits.min, limits.max, limits.tiny / 4, 0.0]
    elif tensor.dtype == torch.bool:
        choices = [True, False]
    else:
        choices = [-100, -1, 10**6, torch.iinfo(tensor.dtype).max, torch.iinfo(tensor.dtype).min]
        choices = [c for c in choices if abs(c) <= torch.iinfo(tensor.dtype).max + 1]
    value = random_.choice(choices)
    flat = tensor.view(-1)
    if random_.random() < 0.2:
        flat.fill_(value)
    else:
        for _ in range(random_.randint(1, 3)):
            if len(flat):
                flat[random_.randrange(len(flat))] = value
    return Hostile(tensor, ANY, f"holds {value}")


def elsewhere(tensor: torch.Tensor, random_: random.Random) -> Hostile:
    if random_.random() < 0.5:
        return Hostile(tensor.to("meta"), ANY, "meta")
    if not tensor.is_floating_point():
        return Hostile(None, ANY, "None")
    return Hostile(tensor.detach().clone().requires_grad_(), ANY, "requires grad")


def tensor(tensor_: torch.Tensor, random_: random.Random) -> Hostile:
    makers = (layout, layout, shape, shape, dtype, values, values, elsewhere)
    if random_.random() < 0.08:
        return not_a_tensor(random_)
    return random_.choice(makers)(tensor_, random_)


def number(random_: random.Random) -> Hostile:
    value = random_.choice(
        [
            math.nan, math.inf, -math.inf, -1.0, 0, True, 1e-30, 1e30, "1", [], None,
            np.float64(0.5), np.int64(1), np.array(0.25), torch.tensor(0.5),
        ]
    )  # fmt: skip
    expected = REFUSED if isinstance(value, (str, list, bool)) or value != value else ANY
    return Hostile(value, expected, repr(value))


def option(random_: random.Random) -> Hostile:
    value = random_.choice(["nonsense", "", 3, [], "TOKEN", b"k1"])
    return Hostile(value, REFUSED, repr(value))
