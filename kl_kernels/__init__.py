"""Fused log-softmax, exact per-token KL, entropy and shaped reward: each logit is read once."""

from kl_kernels._version import __version__
from kl_kernels.functional import (
    KLRewards,
    TokenKL,
    TokenStats,
    kl_rewards,
    selective_log_softmax,
    token_kl,
    token_stats,
)

__all__ = [
    "KLRewards",
    "TokenKL",
    "TokenStats",
    "__version__",
    "kl_rewards",
    "selective_log_softmax",
    "token_kl",
    "token_stats",
]
