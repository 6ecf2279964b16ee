"""Sets of tokens that a sampler kept: top-k, top-p and min-p as the trainer must see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kl_kernels import checks
from kl_kernels.algebra.segments import Segments


@dataclass(frozen=True, eq=False)
class Support:
    """Kept sets of rows, one after the other: what CSR calls indices and row pointers.

    Row r keeps `token_ids[offsets[r] : offsets[r + 1]]`, in any order. A row without entries is
    over the whole vocabulary. Rows are in the order of the `token_ids.flatten()` that the set goes
    with.

    Args:
        token_ids: [nnz] int64 or int32; distinct in a row, 0 or above.
        offsets: [rows + 1] int64 or int32, ascending from 0 to nnz.

    Raises:
        TypeError, ValueError: a tensor has the wrong type, dtype, shape or device; on a CPU, also
            what it holds: the message names row and value. A GPU is not waited for.

    Examples:
        >>> import torch, kl_kernels
        >>> kept = kl_kernels.Support(torch.tensor([2, 0, 1]), torch.tensor([0, 2, 3]))
        >>> kept.rows
        2
    """

    token_ids: Tensor  # [nnz]
    offsets: Tensor  # [rows + 1]

    def __post_init__(self) -> None:
        for name in ("token_ids", "offsets"):
            tensor = getattr(self, name)
            checks.check_tensor(name, tensor)
            checks.check_token_dtype(tensor, name)
            if tensor.ndim != 1:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it must be 1-dim")
        checks.check_same_device("offsets", self.offsets, "token_ids", self.token_ids)
        if len(self.offsets) == 0:
            raise ValueError("offsets has shape (0,); it must be [rows + 1]")
        if checks.values_are_at_hand(self.offsets):
            _check_offsets(self.offsets, len(self.token_ids))
            _check_ids(self.token_ids, Segments.of(self.offsets, len(self.token_ids)).row)

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    def to(self, device: torch.device | str) -> Support:
        """The same sets on another device."""
        return Support(self.token_ids.to(device), self.offsets.to(device))

    @classmethod
    def from_padded(cls, ids: Tensor, pad: int = -1) -> Support:
        """The sets of rows that are padded to one length.

        Args:
            ids: [..., K] int64 or int32; a row of padding is over the whole vocabulary.
            pad: fills up a row, at any place; an integer that is no token.

        Examples:
            >>> import torch, kl_kernels
            >>> kl_kernels.Support.from_padded(torch.tensor([[4, 7], [5, -1]])).offsets.tolist()
            [0, 2, 3]
        """
        checks.check_tensor("ids", ids)
        checks.check_token_dtype(ids, "ids")
        if ids.ndim == 0:
            raise ValueError("ids has shape (); it must be [..., K]")
        listed = ids != checks.check_integer("pad", pad)
        return cls(ids[listed], _offsets(listed))

    @classmethod
    def from_mask(cls, mask: Tensor) -> Support:
        """The sets of rows of a mask, which holds nnz among rows times V values.

        Args:
            mask: [..., V] bool, True at the tokens of the set. A row that is all True, or all
                False, lists nothing: it is over the whole vocabulary.

        Examples:
            >>> import torch, kl_kernels
            >>> kl_kernels.Support.from_mask(torch.tensor([[True, False, True]])).token_ids.tolist()
            [0, 2]
        """
        checks.check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; accepted: bool")
        if mask.ndim == 0:
            raise ValueError("mask has shape (); it must be [..., V]")
        listed = mask & ~mask.all(-1, keepdim=True)
        return cls(listed.nonzero()[:, -1], _offsets(listed))

    @classmethod
    def of(
        cls,
        logits: Tensor,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        temperature: float = 1.0,
    ) -> Support:
        """The tokens of each row that a sampler may draw, as vLLM restricts them.

        In this order: the temperature; min-p (tokens at least `min_p` times as likely as the
        likeliest); top-k (no less likely than the k-th, so that ties with it stay); top-p, of what
        is left and renormalised (the likeliest tokens, as many as it takes to reach `top_p`, at
        least one). Of tokens that tie where top-p ends those with the larger ids stay; an engine
        may keep others, but as many. Probabilities are float32, as there (float64 for float64).

        An engine that returns the sets it sampled from is the better source: one rounding more or
        less at a border decides whether a token is in.

        Args:
            logits: [..., V] float32, bfloat16, float16 or float64, before the temperature.
            top_k: 1 or above. None: no such bound.
            top_p: above 0, at most 1. None or 1: no such bound.
            min_p: 0 to 1. None or 0: no such bound.
            temperature: divides the logits; finite and above 0.

        Examples:
            >>> import torch, kl_kernels
            >>> logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
            >>> kl_kernels.Support.of(logits, top_p=0.7).token_ids.tolist()
            [0, 1]
        """
        checks.check_logits("logits", logits)
        temperature = checks.check_positive("temperature", temperature)
        z = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
        z = z / temperature
        if min_p is not None:
            p = z.softmax(-1)
            least = checks.check_unit_interval("min_p", min_p) * p.amax(-1, keepdim=True)
            z = z.masked_fill(p < least, -torch.inf)
        if top_k is not None:
            k = min(checks.check_integer("top_k", top_k, at_least=1), z.shape[-1])
            z = z.masked_fill(z < z.topk(k).values[..., -1:], -torch.inf)
        if top_p is not None:
            z = _likeliest(z, checks.check_unit_interval("top_p", top_p))
        return cls.from_mask(z > -torch.inf)


def _likeliest(z: Tensor, top_p: float) -> Tensor:  # [..., V]
    if top_p == 0:
        raise ValueError("top_p is 0; it must be above 0, and at most 1")
    if top_p == 1:
        return z
    ordered, ids = z.sort(dim=-1, stable=True)  # ascending
    dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[..., -1] = False
    return z.masked_fill(torch.empty_like(dropped).scatter_(-1, ids, dropped), -torch.inf)


def _offsets(listed: Tensor) -> Tensor:  # [..., K] -> [rows + 1]
    counts = listed.sum(-1).flatten()
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _check_offsets(offsets: Tensor, n_entries: int) -> None:
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0:
        raise ValueError(f"offsets begins with {first}; it must begin with 0")
    row = checks.first_true(offsets.diff() < 0)
    if row is not None:
        raise ValueError(
            f"offsets falls from {int(offsets[row])} to {int(offsets[row + 1])} at row {row}; "
            "it must ascend"
        )
    if last != n_entries:
        raise ValueError(f"offsets ends with {last}; token_ids of {n_entries} needs {n_entries}")


def _check_ids(ids: Tensor, rows: Tensor) -> None:  # [nnz] each
    at = checks.first_true(ids < 0)
    if at is not None:
        raise ValueError(
            f"token_ids holds {int(ids[at])} in row {int(rows[at])}; it must hold tokens, from 0 on"
        )
    ordered, order = ids.sort(stable=True)
    row = rows[order]  # ascending where the ids are equal
    at = checks.first_true((ordered[1:] == ordered[:-1]) & (row[1:] == row[:-1]))
    if at is not None:
        raise ValueError(
            f"token_ids holds {int(ordered[at])} twice in row {int(row[at])}; the ids of a row "
            "must be distinct"
        )
