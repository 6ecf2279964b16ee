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
def tile_offsets(STEPS: tl.constexpr, N: tl.constexpr, LANE: tl.constexpr):
    """[STEPS, N, LANE]: one lane per thread, which reads LANE neighbours at once in each step."""
    step = tl.arange(0, STEPS)[:, None, None] * (N * LANE)
    return step + tl.arange(0, N)[None, :, None] * LANE + tl.arange(0, LANE)[None, None, :]
