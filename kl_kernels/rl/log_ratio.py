"""The log-ratio of two policies at the sampled tokens."""

from __future__ import annotations

from torch import Tensor

from kl_kernels.algebra.epilogues import log_ratio_of
from kl_kernels.rl.masked import select
from kl_kernels.schemas import output_dtype


def masked_log_ratio(
    logprobs: Tensor,  # [...]
    constant: Tensor,  # [...]
    mask: Tensor | None = None,  # [...]
) -> Tensor:  # [...]
    """`logprobs` - `constant` in float32 or float64; 0 where masked, and where both are -inf."""
    dtype = output_dtype(logprobs)
    ratio = log_ratio_of(logprobs.to(dtype), constant.detach().to(dtype))
    return select(ratio, mask, dtype)
