"""Every backend against float64 eager formulas: forward and every gradient, on hard inputs.

The grid: each difficulty of `validate.cases` at each dtype. Sizes are 1 and 2 (degenerate), one
below a SIMD width or tile, one either side of a power of two, and a real vocabulary; kernels take
different paths for tails and whole blocks, so no size is a multiple of another.
"""

import pytest
import torch

from kl_kernels.lab.validate.cases import DIFFICULTIES, grid
from kl_kernels.lab.validate.errors import errors

# Triton's interpreter takes a second and a half for each case: one size here and one 16-bit dtype,
# the others with random rows alone, and all numbers of tiles, smaller ones, in
# test_triton_backend.py.
SIZES = {
    "reference": (1, 2, 37, 1023, 1025, 9001),
    "cpu": (1, 2, 37, 1023, 1025, 9001, 50257),
    "triton": (1025,),
}


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("backend", SIZES)
def test_outputs_and_gradients_are_true(backend, difficulty):
    sizes, left_out = SIZES[backend], None
    if (backend, difficulty) == ("triton", "random"):
        sizes = (1, 2, *sizes)
    elif backend == "triton":
        left_out = torch.float16
    cases = [c for c in grid(sizes) if c.difficulty == difficulty and c.dtype != left_out]
    wrong = [e for case in cases for e in errors(case, backend) if not e.accepted]
    assert not wrong, "\n".join(map(str, wrong))
