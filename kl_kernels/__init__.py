"""Fused log-softmax, exact per-token KL, entropy and shaped reward: each logit is read once."""

import importlib
from typing import TYPE_CHECKING, Any

from kl_kernels._version import __version__
from kl_kernels.divergence import token_jsd
from kl_kernels.functional import (
    KLRewards,
    TokenKL,
    TokenStats,
    kl_rewards,
    token_kl,
    token_stats,
)
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.constraint import UpdateConstraint
from kl_kernels.monitor.monitor import KLMonitor
from kl_kernels.policy_loss import fused_policy_loss
from kl_kernels.rl.advantages import compute_gae
from kl_kernels.rl.controllers import (
    AdaptiveKLController,
    FixedKLController,
    PIKLController,
    ThresholdKLController,
)
from kl_kernels.rl.early_stop import KLEarlyStop
from kl_kernels.rl.estimators import kl_penalty
from kl_kernels.rl.importance import importance_weights
from kl_kernels.rl.losses import ppo_policy_loss, ppo_value_loss
from kl_kernels.rl.masked import masked_mean, masked_var, masked_whiten
from kl_kernels.rl.rewards import compute_rewards
from kl_kernels.rl.sampling import sampling_gap
from kl_kernels.rl.scores import (
    length_normalized_scores,
    missing_eos_penalty,
    overlong_penalty,
)
from kl_kernels.selective import selective_log_softmax
from kl_kernels.topk import topk_kl

__all__ = [
    "AdaptiveKLController",
    "AuditLog",
    "FixedKLController",
    "KLEarlyStop",
    "KLMonitor",
    "KLRewards",
    "PIKLController",
    "ThresholdKLController",
    "TokenKL",
    "TokenStats",
    "UpdateConstraint",
    "__version__",
    "compute_gae",
    "compute_rewards",
    "fused_policy_loss",
    "importance_weights",
    "kl_penalty",
    "kl_rewards",
    "length_normalized_scores",
    "linear_token_jsd",
    "linear_token_kl",
    "linear_token_stats",
    "masked_mean",
    "masked_var",
    "masked_whiten",
    "missing_eos_penalty",
    "overlong_penalty",
    "ppo_policy_loss",
    "ppo_value_loss",
    "sampling_gap",
    "selective_log_softmax",
    "token_jsd",
    "token_kl",
    "token_stats",
    "topk_kl",
]

# With linear heads comes all of torch.compile: they are imported when they are asked for.
LAZY = {
    "linear_token_jsd": "linear_jsd",
    "linear_token_kl": "linear",
    "linear_token_stats": "linear",
}

if TYPE_CHECKING:  # which would take any name to be there if it saw __getattr__
    from kl_kernels.linear import linear_token_kl, linear_token_stats
    from kl_kernels.linear_jsd import linear_token_jsd
else:

    def __getattr__(name: str) -> Any:
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)
