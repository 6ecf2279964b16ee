"""The reference backend: the operators of `schemas.OPERATORS`, made of the verbs of `algebra`."""

from kl_kernels.backends.reference.mixture import mixture_part, token_jsd, token_jsd_backward
from kl_kernels.backends.reference.operators import (
    finish_parts,
    fold_part,
    fold_tail,
    gae,
    kl_rewards,
    policy_loss,
    scale_gradient,
    token_kl,
    token_kl_backward,
    token_stats,
    token_stats_backward,
)

__all__ = [
    "finish_parts",
    "fold_part",
    "fold_tail",
    "gae",
    "kl_rewards",
    "mixture_part",
    "policy_loss",
    "scale_gradient",
    "token_jsd",
    "token_jsd_backward",
    "token_kl",
    "token_kl_backward",
    "token_stats",
    "token_stats_backward",
]
