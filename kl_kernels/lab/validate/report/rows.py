"""The rows of a cell: logits of a policy, and a reference at the KL that the cell asks for."""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from kl_kernels.lab.validate.cases import NEG_INF, Inputs
from kl_kernels.lab.validate.report.grid import Cell

HALVINGS = 15
LOG2_STEPS = (-24.0, 12.0)  # range of the distance between the models' logits


def make_rows(cell: Cell, device: str = "cpu") -> Inputs:
    """Logits [1, rows, V] rounded to the cell's dtype, and tokens drawn from the policy.

    The reference is the policy and a step along normal noise, rounded. KL grows with the step, so
    halving finds the one where it is what the cell asks for, or next above: roundings put KLs out
    of reach, the fewer logits there are the more. Random numbers are the CPU's on every device.
    """
    g = torch.Generator().manual_seed(zlib.crc32(cell.name.encode()))
    dtype = getattr(torch, cell.dtype)
    shape = (cell.rows, cell.vocab_size)
    x = (cell.spread * torch.randn(shape, generator=g) + cell.offset).to(dtype)
    noise = torch.randn(shape, generator=g, dtype=torch.float64)
    out = torch.rand(shape, generator=g) < cell.inf_fraction
    out[:, 0] = False  # at least one logit stays finite
    x = x.masked_fill(out, NEG_INF)
    p = (x.double() / cell.temperature).softmax(-1)
    token_ids = torch.multinomial(p, 1, generator=g).squeeze(-1)
    x, p, noise, token_ids = (t.to(device) for t in (x, p, noise, token_ids))
    y = x.clone()
    if cell.kl > 0:
        shift = x.double() - 2 * cell.offset

        def reference(log2_step: Tensor) -> Tensor:  # [n, 1]
            return (shift + log2_step.exp2() * noise).to(dtype)

        low, high = (p.new_full((cell.rows, 1), at) for at in LOG2_STEPS)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            above = exact_kl(x, reference(middle), p, cell.temperature)[:, None] >= cell.kl
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        y = reference(high)
    return Inputs(x[None], y[None], token_ids[None], temperature=cell.temperature)


def exact_kl(x: Tensor, y: Tensor, p: Tensor, temperature: float) -> Tensor:  # [n, V] each
    """KL(p || q) with p = softmax(x / temperature) given, of q on the same support; [n] float64.

    With d = (y - x) / temperature less its mean under p: log q - log p = d - log sum p e^d, and so
    KL = log sum p e^d = log(1 + sum p (e^d - 1 - d)), which cancels nothing where d is small.
    """
    out = x == NEG_INF
    d = ((y.double() - x.double()) / temperature).masked_fill(out, 0.0)
    d = (d - (p * d).sum(-1, keepdim=True)).masked_fill(out, 0.0)
    return (p * (d.expm1() - d)).sum(-1).log1p()
