"""Generalised advantage estimation (Schulman et al., 2016) as a scan from the last token back.

One token maps what follows it, (next value, next advantage), to what precedes it:

    value' = keep value + e        advantage' = c value + d advantage + f

with (keep, c, d, e, f) = (0, gamma, gamma lam, v, r - v) for a token that counts and the identity
for one that is skipped. Such maps compose associatively.
"""

import triton
import triton.language as tl

from kl_kernels.backends.triton.math import sum_of_threads


@triton.jit
def compose(keep1, c1, d1, e1, f1, keep2, c2, d2, e2, f2):
    """First map 1, then map 2: in a reverse scan, 1 is the later part of the sequence."""
    keep = keep2 * keep1
    c = c2 * keep1 + d2 * c1
    d = d2 * d1
    e = keep2 * e1 + e2
    f = c2 * e1 + d2 * f1 + f2
    return keep, c, d, e, f


@triton.jit(do_not_specialize=["n_tokens"])
def gae_kernel(
    rewards_ptr,  # [B, T]
    values_ptr,  # [B, T]
    mask_ptr,  # [B, T]
    advantages_ptr,  # [B, T]
    returns_ptr,  # [B, T]
    n_tokens,
    gamma,
    lam,
    SKIP_MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """One program per sequence, blocks of tokens from the last."""
    base = tl.program_id(0).to(tl.int64) * n_tokens
    next_value = 0.0
    next_advantage = 0.0
    for block in range(tl.cdiv(n_tokens, BLOCK_T) - 1, -1, -1):
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = t < n_tokens
        counts = tl.load(mask_ptr + base + t, inside, 0) != 0
        r = tl.load(rewards_ptr + base + t, counts, 0.0).to(tl.float32)
        v = tl.load(values_ptr + base + t, counts, 0.0).to(tl.float32)
        passes = inside
        if SKIP_MASKED:
            passes = counts
        keep, c, d, e, f = tl.associative_scan(
            (
                tl.where(passes, 0.0, 1.0),
                tl.where(passes, gamma, 0.0),
                tl.where(passes, gamma * lam, 1.0),
                v,
                r - v,
            ),
            0,
            compose,
            reverse=True,
        )
        advantage = c * next_value + d * next_advantage + f
        value = keep * next_value + e
        zero = tl.zeros_like(advantage)
        tl.store(advantages_ptr + base + t, tl.where(counts, advantage, zero), inside)
        tl.store(returns_ptr + base + t, tl.where(counts, advantage + v, zero), inside)
        # The block's first token is the next block's successor.
        first = tl.arange(0, BLOCK_T) == 0
        next_value = sum_of_threads(tl.where(first, value, zero))
        next_advantage = sum_of_threads(tl.where(first, advantage, zero))
