"""Public functions on tensors without data, with the gradients that a training step takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import kl_kernels

MASKED_SHARE = 0.5  # rows that count, where not all do


@dataclass(frozen=True)
class Size:
    """Numbers of a job."""

    rows: int
    width: int  # hidden states' size
    vocab: int
    dtype: torch.dtype
    frozen_head: bool
    reference: bool
    masked: bool
    ranks: int = 1  # that share the vocabulary
    listed: bool = False  # rows that count are known by their positions, not by a mask

    @property
    def local_vocab(self) -> int:
        if self.vocab % self.ranks:
            raise ValueError(
                f"vocab is {self.vocab}, which {self.ranks} ranks cannot share equally"
            )
        return self.vocab // self.ranks


class Job(NamedTuple):
    """A call, and what it must do at the least."""

    forward: Callable[[], Any]
    leaves: Sequence[Tensor]  # the arguments that are differentiated
    constants: Sequence[Tensor]
    products: int  # each 2 rows width vocab FLOP


LISTED = 64  # tokens of a position of which a list tells

SHARDED = (
    *("token_stats", "token_kl"),
    *("linear_token_stats", "linear_token_kl", "linear_token_jsd", "linear_policy_loss"),
)


@contextmanager
def made(name: str, size: Size) -> Iterator[Job]:
    """A job of JOBS; its process group lasts as long."""
    if size.ranks == 1:
        yield JOBS[name](name, size, {})
        return
    if name not in SHARDED:
        raise ValueError(f"ranks is {size.ranks}; {name} takes no group: {', '.join(SHARDED)} do")
    with _group_of_absent_ranks(size.ranks) as group:
        yield JOBS[name](name, size, {"group": group})


@contextmanager
def _group_of_absent_ranks(n: int) -> Iterator[Any]:
    """A process group whose other ranks never answer, which nobody waits for without data."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def _on_logits(name: str, size: Size, shards: dict[str, Any]) -> Job:
    logits = _meta(1, size.rows, size.local_vocab, dtype=size.dtype).requires_grad_()
    ref_logits = _meta(1, size.rows, size.local_vocab, dtype=size.dtype)
    function = getattr(kl_kernels, name)
    ids, options = _ids(size), {"mask": _mask(size), **shards}
    if name == "token_jsd":
        return Job(lambda: function(logits, ref_logits, **options), [logits], [ref_logits], 0)
    if name in ("token_stats", "selective_log_softmax"):
        if name == "selective_log_softmax":
            options = {}
        return Job(lambda: function(logits, ids, **options), [logits], [], 0)
    if name == "token_kl":
        return Job(lambda: function(logits, ref_logits, ids, **options), [logits], [ref_logits], 0)
    old, advantages = _meta(1, size.rows), _meta(1, size.rows)
    mask = _mask_of_all(size)
    given: dict[str, Any] = (
        {"kl_loss_coef": 0.1, "ref_logits": ref_logits} if size.reference else {}
    )
    return Job(
        lambda: function(logits, ids, old, advantages, mask, **given),
        [logits],
        [ref_logits] if size.reference else [],
        0,
    )


def _on_heads(name: str, size: Size, shards: dict[str, Any]) -> Job:
    hidden = _meta(1, size.rows, size.width, dtype=size.dtype).requires_grad_()
    weight = _meta(size.local_vocab, size.width, dtype=size.dtype).requires_grad_(
        not size.frozen_head
    )
    ref_hidden, ref_weight = (torch.empty_like(t).detach() for t in (hidden, weight))
    function, options = getattr(kl_kernels, name), {**_rows(size), **shards}
    leaves = [hidden] if size.frozen_head else [hidden, weight]
    gradients = len(leaves)
    constants = [weight] if size.frozen_head else []
    if name == "linear_policy_loss":
        given: dict[str, Any] = {**shards}
        if size.listed:
            given |= _rows(size)
        if size.reference:
            given |= {"kl_loss_coef": 0.1, "ref_hidden": ref_hidden, "ref_weight": ref_weight}
        of_tokens = _ids(size), _meta(1, size.rows), _meta(1, size.rows), _mask_of_all(size)
        call = lambda: function(hidden, weight, *of_tokens, **given)  # noqa: E731
        if size.reference:
            constants = [*constants, ref_hidden, ref_weight]
        return Job(call, leaves, constants, 1 + size.reference + gradients)
    if name == "linear_token_stats":
        call = lambda: function(hidden, weight, _ids(size), **options)  # noqa: E731
        return Job(call, leaves, constants, 1 + gradients)
    reference = [ref_hidden, ref_weight]
    if name == "linear_token_kl":
        call = lambda: function(hidden, weight, *reference, _ids(size), **options)  # noqa: E731
    else:
        call = lambda: function(hidden, weight, *reference, **options)  # noqa: E731
    return Job(call, leaves, [*constants, *reference], 2 + gradients)


def _on_lists(name: str, size: Size, shards: dict[str, Any]) -> Job:
    """The reference's K likeliest tokens of each position."""
    logits = _meta(1, size.rows, size.vocab, dtype=size.dtype).requires_grad_()
    ids = _meta(1, size.rows, LISTED, dtype=torch.int64)
    listed, mask = _meta(1, size.rows, LISTED), _mask(size)
    return Job(lambda: kl_kernels.topk_kl(logits, ids, listed, mask), [logits], [], 0)


JOBS: dict[str, Callable[[str, Size, dict[str, Any]], Job]] = {
    **dict.fromkeys(
        ("token_stats", "token_kl", "token_jsd", "selective_log_softmax", "fused_policy_loss"),
        _on_logits,
    ),
    "topk_kl": _on_lists,
    **dict.fromkeys(
        ("linear_token_stats", "linear_token_kl", "linear_token_jsd", "linear_policy_loss"),
        _on_heads,
    ),
}


def _meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*size, dtype=dtype, device="meta")


def _ids(size: Size) -> Tensor:
    return _meta(1, size.rows, dtype=torch.int64)


def _mask_of_all(size: Size) -> Tensor:
    return torch.ones(1, size.rows, dtype=torch.bool, device="meta")


def _rows(size: Size) -> dict[str, Tensor | None]:
    if not size.listed:
        return {"mask": _mask(size)}
    return {"row_index": _meta(int(size.rows * MASKED_SHARE), dtype=torch.int64)}


def _mask(size: Size) -> Tensor | None:
    return _meta(1, size.rows, dtype=torch.bool) if size.masked else None
