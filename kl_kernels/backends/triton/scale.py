"""A gradient that is there already, times a number that only the device knows."""

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import to_float32
from kl_kernels.backends.triton.tiles import SIZES, row_pointer, step_offsets


@triton.jit(do_not_specialize=SIZES)
def scale_kernel(
    gradient_ptr,  # [B, T, V]
    factor_ptr,  # []
    n_rows,
    n_tokens,
    vocab_size,
    batch_stride,
    token_stride,
    STEPS: tl.constexpr,
    N: tl.constexpr,
    LANE: tl.constexpr,
):
    """Programs stride over all tiles, so that a factor of 1 is found out by a few of them."""
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    n_tiles = tl.cdiv(vocab_size, STEPS * N * LANE)
    for i in range(tl.program_id(0), n_rows * n_tiles, tl.num_programs(0)):
        row, tile = i // n_tiles, i % n_tiles
        ptr = row_pointer(gradient_ptr, row, n_tokens, batch_stride, token_stride, LANE)
        offsets = step_offsets(tile, STEPS * N, LANE)
        inside = offsets < vocab_size
        value = tl.load(ptr + offsets, inside)
        tl.store(ptr + offsets, (to_float32(value) * factor).to(value.dtype), inside)
