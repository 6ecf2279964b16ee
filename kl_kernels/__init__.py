"""Fused log-softmax, exact per-token KL, entropy and shaped reward: each logit is read once."""

import importlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Any

# `python -m kl_kernels` imports the package first, for seconds, and only then what could catch a
# Ctrl-C. Until `__main__` takes this back, one ends the process without a traceback.
if (
    sys.argv[:1] == ["-m"]
    and sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == [__name__]
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from kl_kernels._version import __version__
from kl_kernels.functional.divergence import token_jsd
from kl_kernels.functional.logits import (
    KLRewards,
    TokenKL,
    TokenStats,
    kl_rewards,
    token_kl,
    token_stats,
)
from kl_kernels.functional.policy_loss import fused_policy_loss
from kl_kernels.functional.selective import selective_log_softmax
from kl_kernels.functional.support import Support
from kl_kernels.functional.topk import topk_kl
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.constraint import UpdateConstraint
from kl_kernels.monitor.monitor import KLMonitor
from kl_kernels.rl.adaptive_controllers import (
    AdaptiveKLController,
    PIKLController,
    ThresholdKLController,
)
from kl_kernels.rl.advantages import compute_gae
from kl_kernels.rl.controllers import FixedKLController
from kl_kernels.rl.denominator import global_denominator
from kl_kernels.rl.early_stop import KLEarlyStop
from kl_kernels.rl.estimators import kl_penalty
from kl_kernels.rl.group_advantages import group_advantages
from kl_kernels.rl.importance import importance_weights
from kl_kernels.rl.losses import aggregate, ppo_policy_loss, ppo_value_loss
from kl_kernels.rl.masked import masked_mean, masked_var, masked_whiten
from kl_kernels.rl.rewards import compute_rewards
from kl_kernels.rl.sampling import sampling_gap
from kl_kernels.rl.scores import (
    length_normalized_scores,
    missing_eos_penalty,
    overlong_penalty,
)

__all__ = [
    "AdaptiveKLController",
    "AuditLog",
    "FixedKLController",
    "KLEarlyStop",
    "KLMonitor",
    "KLRewards",
    "PIKLController",
    "Support",
    "ThresholdKLController",
    "TokenKL",
    "TokenStats",
    "UpdateConstraint",
    "__version__",
    "aggregate",
    "compute_gae",
    "compute_rewards",
    "fused_policy_loss",
    "global_denominator",
    "group_advantages",
    "importance_weights",
    "kl_penalty",
    "kl_rewards",
    "length_normalized_scores",
    "linear_policy_loss",
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
    "linear_policy_loss": "functional.hidden_policy_loss",
    "linear_token_jsd": "functional.hidden_jsd",
    "linear_token_kl": "functional.hidden",
    "linear_token_stats": "functional.hidden",
}

if TYPE_CHECKING:  # a type checker that sees __getattr__ takes any name to be there
    from kl_kernels.functional.hidden import linear_token_kl, linear_token_stats
    from kl_kernels.functional.hidden_jsd import linear_token_jsd
    from kl_kernels.functional.hidden_policy_loss import linear_policy_loss
else:

    def __getattr__(name: str) -> Any:
        if name not in LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{__name__}.{LAZY[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, for completion and `dir()`: those that are imported later, too."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
