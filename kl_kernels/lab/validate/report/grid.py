"""The declared grid of the numerics report: the rows that errors are measured on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SMALL_KL = 1e-5  # nats, the one that the gate has a rule of its own for


@dataclass(frozen=True)
class Cell:
    """Some rows of one kind. The policy's logits are normal, the reference is a KL away."""

    axis: str  # the axis that is varied: the others are at the grid's base
    dtype: str
    vocab_size: int
    kl: float  # KL(policy || reference) aimed at, nats; 0: equal rows
    spread: float  # standard deviation of the logits: how peaked a row is
    temperature: float
    offset: float  # added to the policy's logits, taken from the reference's
    inf_fraction: float  # part of the vocabulary that is -inf in both
    rows: int

    @property
    def name(self) -> str:
        return (
            f"{self.dtype}, V = {self.vocab_size}, KL {self.kl:g}, spread {self.spread:g}, "
            f"temperature {self.temperature:g}, offset {self.offset:g}, "
            f"-inf {self.inf_fraction:g}"
        )


@dataclass(frozen=True)
class NumericsGrid:
    """One axis at a time from a base, in each dtype; the KL at several vocabularies."""

    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    kls: tuple[float, ...] = (0, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100)
    kl_vocab_sizes: tuple[int, ...] = (1025, 50257, 131072)
    vocab_sizes: tuple[int, ...] = (2, 33, 1000, 8191, 32000, 128256, 151936)
    spreads: tuple[float, ...] = (0.1, 1.0, 10.0, 30.0)
    temperatures: tuple[float, ...] = (0.1, 0.7, 2.0, 10.0)
    offsets: tuple[float, ...] = (-1e4, -1e3, -1e2, 1e1, 1e2, 1e3, 1e4)
    inf_fractions: tuple[float, ...] = (0.01, 0.5, 0.99)
    base_vocab_size: int = 50257
    base_kl: float = 1e-2
    base_spread: float = 3.0
    logits_per_cell: int = 2**19
    most_rows: int = 64
    fewest_rows: int = 4

    def cells(self) -> list[Cell]:
        return [cell for dtype in self.dtypes for cell in self._of_dtype(dtype)]

    def _of_dtype(self, dtype: str) -> list[Cell]:
        base = Cell(
            "", dtype, self.base_vocab_size, self.base_kl, self.base_spread, 1.0, 0.0, 0.0, 0
        )
        offsets = [o for o in self.offsets if takes_offset(dtype, o)]
        cells = [
            *(
                replace(base, axis="kl", kl=k, vocab_size=v)
                for v in self.kl_vocab_sizes
                for k in self.kls
            ),
            *(replace(base, axis="vocab_size", vocab_size=v) for v in self.vocab_sizes),
            *(replace(base, axis="spread", spread=s) for s in self.spreads),
            # Small KLs lose most digits on flat rows, to logarithms, and on peaked ones, which
            # have few terms.
            *(replace(base, axis="spread", spread=s, kl=SMALL_KL) for s in self.spreads),
            *(replace(base, axis="temperature", temperature=t) for t in self.temperatures),
            *(replace(base, axis="offset", offset=o) for o in offsets),
            *(replace(base, axis="inf_fraction", inf_fraction=f) for f in self.inf_fractions),
        ]
        return [replace(cell, rows=self._rows(cell.vocab_size)) for cell in cells]

    def _rows(self, vocab_size: int) -> int:
        return min(self.most_rows, max(self.fewest_rows, self.logits_per_cell // vocab_size))


def takes_offset(dtype: str, offset: float) -> bool:
    """Whether numbers around the offset are at most 1 apart, so that logits stay different."""
    return abs(offset) * torch.finfo(getattr(torch, dtype)).eps <= 1


DEFAULT = NumericsGrid()
QUICK = NumericsGrid(
    kls=(0, 1e-5, 1e-2, 10),
    kl_vocab_sizes=(257,),
    vocab_sizes=(2, 33),
    spreads=(0.1, 10.0),
    temperatures=(0.7,),
    offsets=(1e4,),
    inf_fractions=(0.5,),
    base_vocab_size=257,
    most_rows=8,
)
# Triton's interpreter: slow; without fma in old releases, which large offsets need; and it cuts
# numbers off where GPUs round them to bfloat16.
INTERPRETED = replace(
    QUICK,
    dtypes=("float32",),
    kls=DEFAULT.kls,
    vocab_sizes=(2, 33, 1025),
    offsets=(10.0,),
    most_rows=3,
    fewest_rows=3,
)
