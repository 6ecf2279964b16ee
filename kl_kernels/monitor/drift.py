"""The prompts, positions and tokens of a batch that have most of its KL."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_batch,
    check_integer,
    check_like,
    check_mask,
    check_token_dtype,
)


@dataclass(frozen=True)
class Part:
    """The share of a batch's KL that one prompt, position or token has."""

    key: Any  # the prompt's id (or row), the position (column), or the token's id
    kl: float  # nats, summed over its tokens with finite KL
    count: int  # its tokens with finite KL
    mean: float  # kl / count; 0 without any
    share: float  # sum of |kl| over that of the batch, so that signs cannot cancel; 0 to 1
    infinite: int  # its tokens with infinite KL: the reference rules out what the policy does
    text: str | None = None  # a token's, if `decode` was given


@dataclass(frozen=True)
class DriftSummary:
    """A batch's KL by prompt, position and token; sums, means and shares are over finite KL."""

    kl: float  # nats
    count: int  # tokens with finite KL
    infinite: int  # unmasked tokens whose KL is infinite
    nan: int  # unmasked tokens whose KL is NaN, which are left out of everything else
    concentration: float  # share of the 1 % of tokens with the largest |kl|, at least one token
    prompts: tuple[Part, ...]  # the first by infinite tokens, then by KL
    positions: tuple[Part, ...]  # all that have tokens, in order
    tokens: tuple[Part, ...]  # as prompts

    def to_dict(self) -> dict[str, Any]:
        """Return plain values in the nesting of the fields, for logs."""
        return dataclasses.asdict(self)


def summarize_drift(
    kl: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    token_ids: Tensor,  # [B, T]
    prompt_ids: Tensor | Sequence[Hashable] | None = None,  # [B]
    *,
    top: int = 10,
    decode: Callable[[int], str] | None = None,
) -> DriftSummary:
    """Sum a batch's KL by prompt, by position and by token.

    Args:
        kl: per-token KL in nats, exact or sampled, any real dtype; sums are float64.
        mask: bool, or numbers that are 0 or 1; masked positions are ignored.
        token_ids: int64 or int32, the tokens the KL was measured at.
        prompt_ids: rows with the same id count together; None: each row by itself, by its number.
        top: prompts and tokens to name, an integer above 0.
        decode: a token's text, such as `lambda i: tokenizer.decode([i])`, for the tokens named.

    Raises:
        TypeError, ValueError: a shape or dtype is wrong, or top is no integer above 0.
    """
    check_batch("kl", kl)
    check_like("mask", mask, "kl", kl)
    check_like("token_ids", token_ids, "kl", kl)
    check_token_dtype(token_ids)
    mask = check_mask("mask", mask)
    top = check_integer("top", top, at_least=1)
    keys = _prompt_keys(prompt_ids, len(kl))
    kept = mask & ~kl.isnan()
    values = kl.detach()[kept].double().cpu()
    rows, columns = (index.cpu() for index in kept.nonzero(as_tuple=True))
    ids = token_ids[kept].cpu()

    finite = values.isfinite()
    sizes = values[finite].abs()
    total = float(sizes.sum())
    n_largest = math.ceil(0.01 * len(sizes))

    names = list(dict.fromkeys(keys))
    index_of = {key: i for i, key in enumerate(names)}
    prompt_of_row = torch.tensor([index_of[key] for key in keys], dtype=torch.int64, device="cpu")
    prompts = _parts(values, prompt_of_row[rows], names, total)
    positions = _parts(values, columns, range(kl.shape[1]), total)
    unique, token_of = ids.unique(return_inverse=True)
    tokens = _largest(_parts(values, token_of, unique.tolist(), total), top)
    if decode is not None:
        tokens = tuple(dataclasses.replace(t, text=decode(t.key)) for t in tokens)
    return DriftSummary(
        kl=float(values[finite].sum()),
        count=len(sizes),
        infinite=int((~finite).sum()),
        nan=int((mask & kl.isnan()).sum()),
        concentration=float(sizes.topk(n_largest).values.sum()) / total if total > 0 else 0.0,
        prompts=_largest(prompts, top),
        positions=positions,
        tokens=tokens,
    )


def _prompt_keys(prompt_ids: Tensor | Sequence[Hashable] | None, n_rows: int) -> list[Hashable]:
    if prompt_ids is None:
        return list(range(n_rows))
    keys = prompt_ids.tolist() if isinstance(prompt_ids, Tensor) else list(prompt_ids)
    if len(keys) != n_rows:
        raise ValueError(f"prompt_ids has {len(keys)} entries, kl {n_rows} rows; they differ")
    return keys


def _parts(
    values: Tensor,  # [N]
    part_of: Tensor,  # [N], indices into keys
    keys: Sequence[Hashable],
    total: float,
) -> tuple[Part, ...]:
    """The parts that have tokens, in the order of their keys."""
    finite = values.isfinite()

    def sums(x: Tensor) -> list[float]:
        zeros = torch.zeros(len(keys), dtype=torch.float64, device="cpu")
        return zeros.index_add(0, part_of, x).tolist()

    zero = torch.zeros_like(values)
    kl, size = (
        sums(torch.where(finite, values, zero)),
        sums(torch.where(finite, values, zero).abs()),
    )
    count, infinite = sums(finite.double()), sums((~finite).double())
    return tuple(
        Part(
            key=key,
            kl=kl[i],
            count=int(count[i]),
            mean=kl[i] / max(1.0, count[i]),
            share=size[i] / total if total > 0 else 0.0,
            infinite=int(infinite[i]),
        )
        for i, key in enumerate(keys)
        if count[i] or infinite[i]
    )


def _largest(parts: Sequence[Part], top: int) -> tuple[Part, ...]:
    return tuple(sorted(parts, key=lambda part: (-part.infinite, -part.kl))[:top])
