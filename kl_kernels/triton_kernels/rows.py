"""Where a row's logits lie, and how a tile of them is read."""

import triton
import triton.language as tl

from kl_kernels.triton_kernels.math import soft_capped


@triton.jit
def row_pointer(logits_ptr, row, n_tokens, batch_stride, token_stride, LANE: tl.constexpr):
    """The first logit of row b * n_tokens + t; the launcher picked LANE to make the hint true."""
    b, t = row // n_tokens, row % n_tokens
    offset = b.to(tl.int64) * batch_stride + t.to(tl.int64) * token_stride
    return logits_ptr + tl.multiple_of(offset, LANE)


@triton.jit
def load(ptr, offsets, softcap, mask=None):
    """Logits in float32 after softcap; -inf, which counts for nothing, where the mask is False."""
    if mask is None:
        x = tl.load(ptr + offsets)
    else:
        x = tl.load(ptr + offsets, mask, float("-inf"))
    return soft_capped(x.to(tl.float32), softcap)


@triton.jit
def tile_offsets(start, N: tl.constexpr, LANE: tl.constexpr):
    """[N, LANE]: N lanes of LANE neighbours each, so that a lane reads them at once."""
    return start + tl.arange(0, N)[:, None] * LANE + tl.arange(0, LANE)[None, :]
