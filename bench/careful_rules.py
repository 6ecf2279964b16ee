"""Which loops the GPU kernels take for each part of each row: their own rules, vectorised.

`fold_anchored` and `is_sound` of `kl_kernels/triton_kernels`, `fold_part` and `defeated` of
`csrc/cuda/fold.cuh`. Sums are taken in another order than there, which matters only for a row
within rounding of a threshold; NaN, which a kernel's maximum drops, is not provided for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntFlag
from pathlib import Path

import torch
from torch import Tensor

from kl_kernels.triton_kernels import launch
from kl_kernels.triton_kernels.math import EMPTY_ANCHOR, FLOOR, LARGE_SUM, LOG2E

CUDA_SOURCES = Path(__file__).parent.parent / "csrc/cuda"
CUDA_FLOOR = -3e38  # `Limits<float>::kFloor`


class Loops(IntFlag):
    """What a part of a row is folded by; with care after another in vain, it is read twice."""

    FAST = 1
    GUARDED = 2  # the fast one, taking -inf for what it is; `cuda` alone has it
    CAREFUL = 4


@dataclass(frozen=True)
class Pair:
    """Logits of both models in float32, the tokens' as a column, and log2(e) / temperature."""

    x: Tensor  # [R, V]
    y: Tensor  # [R, V]
    xt: Tensor  # [R, 1]
    yt: Tensor  # [R, 1]
    k: float

    @classmethod
    def of(
        cls,
        logits: Tensor,  # [R, V]
        ref_logits: Tensor,  # [R, V]
        token_ids: Tensor,  # [R]
        temperature: float,
    ) -> Pair:
        x, y, tokens = logits.float(), ref_logits.float(), token_ids[:, None]
        return cls(x, y, x.gather(1, tokens), y.gather(1, tokens), LOG2E.value / temperature)

    def parts(self, size: int) -> Iterator[Pair]:
        for x, y in zip(self.x.split(size, 1), self.y.split(size, 1)):
            yield Pair(x, y, self.xt, self.yt, self.k)

    def at(self, columns: slice | list[int]) -> Pair:
        return Pair(self.x[:, columns], self.y[:, columns], self.xt, self.yt, self.k)

    @property
    def has_minus_infinity(self) -> Tensor:  # [R]
        return (torch.minimum(self.x, self.y) == -torch.inf).any(1)

    def measured_from(self, near: Pair) -> tuple[Tensor, Tensor]:
        """tx and ty, [R, V], from anchors at the maxima of the columns `near` and the token's."""
        anchor, ref_anchor = (
            (torch.maximum(seen.amax(1, keepdim=True), token) * self.k).clamp_min(
                EMPTY_ANCHOR.value
            )
            for seen, token in ((near.x, self.xt), (near.y, self.yt))
        )
        return self.x * self.k - anchor, self.y * self.k - ref_anchor


def sums(tx: Tensor, ty: Tensor) -> tuple[Tensor, ...]:
    """The summands of sx, sy, ex, rk and fk."""
    w, u = tx.exp2(), ty.exp2()
    return w, u, w * tx, w * (tx - ty), u * (ty - tx)


# Triton


@dataclass(frozen=True)
class TritonRule:
    """Sizes as `launch` chooses them for these logits."""

    tile: int
    split: int
    large_sum: float = LARGE_SUM.value

    @classmethod
    def for_logits(cls, logits: Tensor, ref_logits: Tensor) -> TritonRule:  # [R, V] each
        sizes = launch.tile_of(logits[None], ref_logits[None])
        return cls(sizes["STEPS"] * sizes["N"] * sizes["LANE"], launch.CONFIG.fold_split)

    def part_size(self, vocab_size: int) -> int:
        return self.split

    def loops(self, part: Pair) -> Tensor:  # [R]
        before_last = (part.x.shape[1] - 1) // self.tile * self.tile
        first = part.at(slice(self.tile))
        # Scaled as in the kernel: finfo.min overflows.
        scaled = Pair(first.x * part.k, first.y * part.k, part.xt, part.yt, 1.0)
        at_once = scaled.has_minus_infinity & (before_last > 0)
        tx, ty = part.measured_from(first)
        for t in (tx, ty):
            t[:, before_last:].clamp_(min=FLOOR.value)  # the last tile is guarded
        sx, sy, *others = (summand.sum(1) for summand in sums(tx, ty))
        sound = (sx <= self.large_sum) & (sy <= self.large_sum)
        for total in others:
            sound &= total.isfinite()
        return torch.where(
            at_once, Loops.CAREFUL, torch.where(sound, Loops.FAST, Loops.FAST | Loops.CAREFUL)
        )


# CUDA


@dataclass(frozen=True)
class CudaRule:
    """`LaunchPolicy` and `kCrowded`, and other rules to compare with."""

    threads: int
    lanes: int
    part: int
    crowded: float  # weight that a thread's sums may hold

    @classmethod
    def of_header(cls) -> CudaRule:
        text = "".join((CUDA_SOURCES / name).read_text() for name in ("launch.h", "fold.cuh"))

        def constant(name: str) -> int:
            return int(re.findall(rf"constexpr (?:int|float) {name} = (\d+);", text)[0])

        return cls(*map(constant, ("kThreads", "kLanes", "kPart", "kCrowded")))

    @property
    def tile(self) -> int:
        return self.threads * self.lanes

    def part_size(self, vocab_size: int) -> int:
        """`split_of`."""
        n_parts = -(-vocab_size // self.part)
        return -(-vocab_size // (n_parts * self.tile)) * self.tile

    def loops(self, part: Pair) -> Tensor:  # [R]
        size = part.x.shape[1]
        whole = size // self.lanes * self.lanes
        near = part.at([*range(min(self.tile, whole)), size - 1])
        scaled = Pair(near.x * part.k, near.y * part.k, part.xt * part.k, part.yt * part.k, 1.0)
        without_anchor = torch.zeros(len(part.x), dtype=torch.bool)
        for seen, token in ((scaled.x, scaled.xt), (scaled.y, scaled.yt)):
            without_anchor |= (torch.maximum(seen.amax(1), token[:, 0])) == -torch.inf
        guarded = scaled.has_minus_infinity
        tx, ty = part.measured_from(near)
        for t in (tx, ty):
            t[guarded] = t[guarded].clamp(min=CUDA_FLOOR)
        sx, sy, ex, rk, fk = (self.per_thread(summand, whole) for summand in sums(tx, ty))
        # The guarded loop knows which divergences are infinite.
        for total, sign in ((rk, 1), (fk, -1)):
            alone = part.x - part.y == sign * torch.inf
            total[guarded[:, None] & (self.per_thread(alone.float(), whole) > 0)] = 0
        total = sx + sy + ex + rk + fk
        crowded = (sx > self.crowded) | (sy > self.crowded)
        defeated = (~total.isfinite() | crowded).any(1)
        first = torch.where(guarded, Loops.GUARDED, Loops.FAST)
        loops = torch.where(defeated, first | Loops.CAREFUL, first)
        return torch.where(without_anchor, Loops.CAREFUL, loops)

    def per_thread(self, summand: Tensor, whole: int) -> Tensor:  # [R, size] -> [R, threads]
        n_rows, size = summand.shape
        padding = -whole % self.tile
        tiles = torch.nn.functional.pad(summand[:, :whole], (0, padding))
        result = tiles.view(n_rows, -1, self.threads, self.lanes).sum((1, 3))
        result[:, : size - whole] += summand[:, whole:]
        return result


Rule = TritonRule | CudaRule


def loops_taken(
    rule_for: Callable[[Tensor, Tensor], Rule],
    logits: Tensor,  # [R, V]
    ref_logits: Tensor,  # [R, V]
    token_ids: Tensor,  # [R]
    temperature: float = 1.0,
    rows_at_once: int = 64,
) -> Tensor:  # [R, parts] of Loops
    rule = rule_for(logits, ref_logits)
    size = rule.part_size(logits.shape[1])
    rows = (t.split(rows_at_once) for t in (logits, ref_logits, token_ids))
    return torch.cat(
        [
            torch.stack([rule.loops(part) for part in Pair.of(*r, temperature).parts(size)], 1)
            for r in zip(*rows)
        ]
    )
