"""Gradients in vectors that begin where memory has them aligned, wherever their row does.

The interpreter reads and writes any address: `make machine` runs these tests as machine code, where
an address that is not aligned is an error. Tiles are as small as in test_triton_backend.py, but for
that: compiled, a lane is a thread, of whole warps.
"""

import dataclasses
import os

import pytest
import torch
import triton_writers
from triton_writers import MASK, SMALL, WRITERS, mixture_backward

from kl_kernels.backends.triton import launch

ONE_WARP = {"lanes": 32, "num_warps": 1, "policy_loss_lanes": 32, "policy_loss_warps": 1}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    compiled = {} if os.environ.get("TRITON_INTERPRET") == "1" else ONE_WARP
    monkeypatch.setattr(launch, "CONFIG", dataclasses.replace(launch.CONFIG, **SMALL | compiled))


ODD = 155  # a split of a gradient and a part of one; rows begin at every place in a vector


@pytest.mark.parametrize(("dtype", "hostile"), [(torch.float32, True), (torch.bfloat16, False)])
@pytest.mark.parametrize("write", [*WRITERS, mixture_backward])
def test_a_rows_gradient_is_the_same_wherever_the_row_begins(write, dtype, hostile, monkeypatch):
    n = 16 // dtype.itemsize  # one row at each place, and one at the first again
    x, y, token_ids = (t[0, 0] for t in triton_writers.draw(dtype=dtype))
    monkeypatch.setattr(triton_writers, "MASK", torch.ones(1, n + 1, dtype=torch.bool))
    if hostile:
        x[5], x[ODD - 1], x[17], y[9], y[ODD - 2] = 90.0, -torch.inf, -torch.inf, -torch.inf, 60.0
    x, y = (t[:ODD].expand(1, n + 1, ODD).clone() for t in (x, y))
    token_ids = token_ids.expand(1, n + 1).clone()
    grad = torch.full_like(x, torch.nan)
    write(x, y, token_ids, grad)
    assert torch.equal(bits(grad), bits(grad[0, 0].expand_as(grad)))
    # Where the gradient has its vectors at other logits, it is written logit by logit.
    apart = torch.full((1, n + 1, ODD + 2), torch.nan, dtype=dtype)[..., 1:-1]
    assert launch.gradient_tile_of(x, y, apart)["LANE"] == 1
    write(x, y, token_ids, apart)
    assert torch.equal(bits(apart), bits(grad))


def bits(x):
    return x.contiguous().view(torch.int32 if x.itemsize == 4 else torch.int16)


@pytest.mark.parametrize("write", [*WRITERS, mixture_backward])
@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, torch.bfloat16), (9, torch.float32), (73, torch.bfloat16)]
)
def test_rows_of_few_vectors_or_none(vocab_size, dtype, write):
    """Every logit's gradient is written, in place too, and nothing beside the rows."""
    x, y, token_ids = triton_writers.draw(dtype=dtype)
    memory = [torch.full((6 * vocab_size + 4,), 7.0, dtype=dtype) for _ in (x, y)]
    strides = (3 * vocab_size + 2, vocab_size, 1)
    x_rows, y_rows = (m.as_strided((2, 3, vocab_size), strides, 1) for m in memory)
    x_rows.copy_(x[..., :vocab_size])
    y_rows.copy_(y[..., :vocab_size])
    assert launch.gradient_tile_of(x_rows, y_rows)["LANE"] == 16 // dtype.itemsize
    apart = torch.full_like(x_rows, torch.nan)
    write(x_rows, y_rows, token_ids % vocab_size, apart)
    assert not apart.isnan().any()
    assert (apart[~MASK] == 0).all()
    write(x_rows, y_rows, token_ids % vocab_size, x_rows)
    assert torch.equal(x_rows, apart)
    x_rows.fill_(7.0)
    assert (memory[0] == 7).all()


def rows(*strides, at=0, dtype=torch.bfloat16):
    return torch.zeros(10_000, dtype=dtype).as_strided((2, 3, ODD), (*strides, 1), at)


@pytest.mark.parametrize(
    ("logits", "gradient", "lane"),
    [
        (rows(3 * ODD, ODD), rows(3 * ODD, ODD), 8),
        (rows(3 * ODD, ODD, dtype=torch.float32), rows(3 * ODD, ODD, dtype=torch.float32), 4),
        (rows(3 * ODD, ODD), rows(3 * ODD, ODD, dtype=torch.float32), 4),
        (rows(4 * ODD, ODD, at=ODD), rows(4 * ODD, ODD, at=ODD), 8),
        (rows(4 * 303, 303), rows(4 * 311, 311), 8),
        # Other vectors, by the first row, by the stride of tokens, of sequences.
        (rows(3 * ODD, ODD), rows(3 * ODD, ODD, at=1), 1),
        (rows(3 * 303, ODD), rows(3 * 303, 303), 1),
        (rows(4 * ODD, ODD), rows(3 * ODD, ODD), 1),
        (rows(0, 0), rows(3 * ODD, ODD), 1),
        # Strides that are never gone.
        (rows(4 * ODD, ODD)[:1], rows(3 * ODD, ODD)[:1], 8),
        (rows(0, 0)[:1, :1], rows(3 * ODD, ODD)[:1, :1], 8),
    ],
)
def test_vectors_are_at_the_same_logits_of_all_tensors(logits, gradient, lane):
    assert launch.gradient_tile_of(logits, gradient)["LANE"] == lane
    assert launch.gradient_tile_of(logits, None, gradient)["LANE"] == lane
