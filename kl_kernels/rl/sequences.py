"""Where sequences lie among tokens: the rows of [B, T], or stretches of a packed [N] or [1, N].

A function asks `sequences_of` once, and then looks along sequences with these methods alone. Packed
tokens are never padded, and nobody waits for a GPU: memory and time follow N and S.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_batch,
    check_cu_seqlens,
    check_per_sequence,
    check_plain,
    check_same_device,
    check_same_kind,
    check_tensor,
)


class Rows:
    """Sequences that are the rows of [B, T]."""

    cu_seqlens = None

    def __init__(self, name: str, tokens: Tensor) -> None:
        self.name, self.tokens = name, tokens
        self.longest: int | Tensor = tokens.shape[1]

    def check_scores(self, name: str, scores: Tensor) -> None:
        """`scores` must be [B], on the tokens' device."""
        check_per_sequence(name, scores, self.name, self.tokens)

    def are_of_tokens(self, scores: Tensor) -> bool:
        """Whether `scores` are [B, T], one for each token."""
        return scores.shape == self.tokens.shape

    def lengths(self) -> Tensor:  # [B] int64
        n_batch, n_tokens = self.tokens.shape
        return torch.full((n_batch,), n_tokens, device=self.tokens.device)

    def sums(self, x: Tensor) -> Tensor:  # [B, T] -> [B]
        return x.sum(1)

    def with_tokens(self, mask: Tensor) -> Tensor:  # [B, T] bool -> []
        """Number of sequences that have a token under the mask."""
        return mask.any(1).sum()

    def at_tokens(self, per_sequence: Tensor) -> Tensor:  # [B] -> [B, 1], for every token
        return per_sequence.unsqueeze(1)

    def positions(self) -> Tensor:  # [T] int64
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    def last(self, mask: Tensor) -> Tensor:  # [B, T] bool -> [B] int64
        """The position of each sequence's last token under the mask, -1 without one."""
        found = torch.where(mask, self.positions(), -1)
        return found.amax(1) if mask.shape[1] else self.lengths() - 1


class Packed:
    """Sequences end to end in [N] or [1, N]: s has the tokens from cu_seqlens[s] to before [s + 1].

    Where `cu_seqlens` is wrong and cannot be looked at, a token is of some sequence all the same.
    """

    def __init__(self, name: str, tokens: Tensor, cu_seqlens: Tensor) -> None:
        self.name, self.shape = name, tokens.shape
        self.cu_seqlens = cu_seqlens.long().contiguous()  # [S + 1]
        self._n = len(cu_seqlens) - 1
        self._found: Tensor | None = None
        self.longest: int | Tensor = self.lengths().amax() if self._n else 0

    def check_scores(self, name: str, scores: Tensor) -> None:
        """`scores` must be [S], on the tokens' device."""
        check_tensor(name, scores)
        if scores.shape != (self._n,):
            raise ValueError(
                f"{name} has shape {tuple(scores.shape)}; cu_seqlens of shape "
                f"({self._n + 1},) needs ({self._n},), one for each sequence"
            )
        check_same_device(name, scores, "cu_seqlens", self.cu_seqlens)

    def are_of_tokens(self, scores: Tensor) -> bool:
        """Whether `scores` are [N] or [1, N] as the tokens are; [S] if that is the same shape."""
        return scores.shape == self.shape and scores.shape != (self._n,)

    def _of_token(self) -> Tensor:  # [N] int64
        """The sequence of each token: the number of those that end where it is, or before."""
        if self._found is None:
            n = self.shape.numel()
            ends = self.cu_seqlens[1:].clamp(0, n)
            at = torch.zeros(n + 1, dtype=torch.int64, device=ends.device)
            ended = at.index_add(0, ends, torch.ones_like(ends)).cumsum(0)
            self._found = ended[:n].clamp_max(self._n - 1)
        return self._found

    def lengths(self) -> Tensor:  # [S] int64
        return self.cu_seqlens.diff()

    def sums(self, x: Tensor) -> Tensor:  # [N] or [1, N] -> [S]
        # One is added to the other: in float32 a long sequence would lose digits.
        dtype = torch.float64 if x.is_floating_point() else torch.int64
        zeros = torch.zeros(self._n, dtype=dtype, device=x.device)
        total = zeros.index_add(0, self._of_token(), x.flatten().to(dtype))
        return total.to(x.dtype) if x.is_floating_point() else total

    def with_tokens(self, mask: Tensor) -> Tensor:  # [N] or [1, N] bool -> []
        """Number of sequences that have a token under the mask."""
        return (self.sums(mask) > 0).sum()

    def at_tokens(self, per_sequence: Tensor) -> Tensor:  # [S] -> [N] or [1, N]
        return per_sequence.index_select(0, self._of_token()).view(self.shape)

    def positions(self) -> Tensor:  # [N] or [1, N] int64
        """Each token's position in its own sequence."""
        index = torch.arange(self.shape.numel(), device=self.cu_seqlens.device)
        return index.view(self.shape) - self.at_tokens(self.cu_seqlens[:-1])

    def last(self, mask: Tensor) -> Tensor:  # [N] or [1, N] bool -> [S] int64
        """The position of each sequence's last token under the mask, -1 without one."""
        found = torch.where(mask, self.positions(), -1).flatten()
        nowhere = torch.full((self._n,), -1, device=mask.device)
        return nowhere.scatter_reduce(0, self._of_token(), found, "amax")


Sequences = Rows | Packed


def sequences_of(name: str, tokens: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of what is per token.

    Args:
        name: of `tokens`, for errors.
        tokens: [B, T]; with `cu_seqlens` [N] or [1, N].
        cu_seqlens: [S + 1] int32 or int64, ascending from 0 to N (looked at on a CPU alone). None:
            each row is one sequence.

    Raises:
        TypeError, ValueError: one has the wrong type, shape or device; on a CPU also where
            `cu_seqlens` does not ascend from 0 to N.
    """
    if cu_seqlens is None:
        check_batch(name, tokens)
        return Rows(name, tokens)
    check_tensor(name, tokens)
    check_cu_seqlens(name, tokens.shape, cu_seqlens)
    check_same_kind("cu_seqlens", cu_seqlens, name, tokens)
    check_plain(name, tokens)
    check_same_device("cu_seqlens", cu_seqlens, name, tokens)
    return Packed(name, tokens, cu_seqlens)
