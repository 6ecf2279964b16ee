"""OpenRLHF: the fused functions, and the KL and rewards of this package, in the place of its own.

    from kl_kernels.integrations import openrlhf

    openrlhf.patch()

A patch is in force in the process that made it, and OpenRLHF computes in Ray's workers: how they
all come to be patched stands in docs/how-to/openrlhf.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from torch import Tensor

from kl_kernels.checks import check_choice
from kl_kernels.functional.logits import token_stats
from kl_kernels.integrations.entropy import entropy_from_logits
from kl_kernels.integrations.patching import Patch, Replacement, always, replacements_of
from kl_kernels.rl.estimators import kl_penalty
from kl_kernels.rl.log_ratio import masked_log_ratio
from kl_kernels.rl.masked import masked_mean
from kl_kernels.rl.rewards import compute_rewards
from kl_kernels.rl.straight_through import clamp_value, with_value
from kl_kernels.schemas import BackendName

__all__ = ["patch"]

Estimator = Literal["k1", "k2", "k3"]
KL_CLAMP = 10.0
# OpenRLHF's is -10, from below alone. This is the least that leaves all of its values, clamped at
# 10, as they are: at d = 11, k3 is 10 as well.
LOG_RATIO_CLAMP = 11.0
MAX_IMPORTANCE_WEIGHT = 10.0  # KL_IS_WEIGHT_CLIP


def patch(*, backend: BackendName | None = None) -> Patch:
    """Put this package's functions in the place of the installed OpenRLHF's, until it is undone.

    Replaced are, wherever OpenRLHF has imported them, of openrlhf.models.utils:
    `log_probs_from_logits`, `compute_entropy`, `compute_approx_kl`, `compute_reward` and
    `masked_mean`.

    Results are OpenRLHF's up to rounding, with these differences:

    - Log-probabilities and entropies are float32 where OpenRLHF returns bfloat16; the logits are
      left as they are, where OpenRLHF divides them by `temperature` in place.
    - -inf logits have the entropy they have, not NaN.
    - The KL has OpenRLHF's values, clamped at 10 nats, but not a gradient of 0 where they are
      clamped: k1's stays 1, k2's the log-ratio, and k3's 1 - reference / policy, with their
      log-ratio clamped to 11. The reference never gets a gradient. A token that both sides rule
      out (log-probability -inf) has a KL of 0, not NaN.
    - Rewards are 0 where masked, and a response without tokens gets no reward, where OpenRLHF puts
      its score in the last column.
    - A coefficient below 0 is refused, where OpenRLHF takes it for 0, and so is a mask that is not
      of 0 and 1.
    - A mean over no positions is 0, not NaN, and NaN at a masked position does not reach any mean.

    Args:
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        The patch, in force: a context manager that undoes it, with `undo()` for other places.

    Raises:
        UnsupportedVersionError: the installed OpenRLHF is not 0.11, or not as it was.
    """
    return Patch(replacements_of(_BY_VERSION, "openrlhf", backend=backend))


def _compute_approx_kl(
    log_probs: Tensor,  # [...]
    log_probs_base: Tensor,  # [...]
    log_probs_old: Tensor | None = None,  # [...]
    kl_estimator: Estimator = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    check_choice("kl_estimator", kl_estimator, get_args(Estimator))
    log_probs = log_probs.float()
    if kl_estimator == "k1" and not unbiased_gradient:
        # Accepted as a loss, too: it is OpenRLHF's default, which warns of it.
        return clamp_value(masked_log_ratio(log_probs, log_probs_base), KL_CLAMP)
    kl = kl_penalty(
        log_probs,
        log_probs_base,
        kl_estimator,
        gradient="detach" if unbiased_gradient else "pathwise",
        log_ratio_clamp=LOG_RATIO_CLAMP if kl_estimator == "k3" else None,
        kl_clamp=KL_CLAMP,
    )
    if not unbiased_gradient:
        return kl
    if log_probs_old is None:
        return with_value(kl_penalty(log_probs, log_probs_base, "k2"), kl)
    weight = masked_log_ratio(log_probs, log_probs_old).detach().exp()
    weight = weight.clamp_max(MAX_IMPORTANCE_WEIGHT)
    # Tokens of weight 0, which the policy rules out, are masked: their log-ratio may be infinite.
    surrogate = kl_penalty(log_probs, log_probs_base, "k2", mask=weight != 0)
    return with_value(weight * surrogate, kl)


def _compute_reward(
    r: Tensor,  # [B]
    kl_coef: float,
    kl: Tensor,  # [B, T]
    action_mask: Tensor | None = None,  # [B, T]
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    if action_mask is None:
        raise ValueError("action_mask is None; the last token of a response is needed")
    if reward_clip_range:
        r = r.clamp(*reward_clip_range)
    return compute_rewards(r, kl, action_mask, kl_coef)


def _masked_mean(
    tensor: Tensor,  # [...]
    mask: Tensor | None,  # [...]
    dim: int | None = None,
) -> Tensor:
    return tensor.mean(dim=dim) if mask is None else masked_mean(tensor, mask, dim)


def _log_probs_from_logits(backend: BackendName | None) -> Callable[..., Tensor]:
    def log_probs_from_logits(
        logits: Tensor,  # [..., V]
        labels: Tensor,  # [...]
        temperature: float = 1.0,
    ) -> Tensor:
        return token_stats(logits, labels, temperature=temperature, backend=backend).logprob

    return log_probs_from_logits


def _replacements(backend: BackendName | None) -> Sequence[Replacement]:
    """Return the replacements for 0.11."""
    utils = "openrlhf.models.utils"
    return [
        Replacement(
            utils,
            "log_probs_from_logits",
            ("logits", "labels", "temperature"),
            always(_log_probs_from_logits(backend)),
        ),
        Replacement(utils, "compute_entropy", ("logits",), always(entropy_from_logits(backend))),
        Replacement(
            utils,
            "compute_approx_kl",
            ("log_probs", "log_probs_base", "log_probs_old", "kl_estimator", "unbiased_gradient"),
            always(_compute_approx_kl),
        ),
        Replacement(
            utils,
            "compute_reward",
            ("r", "kl_coef", "kl", "action_mask", "reward_clip_range"),
            always(_compute_reward),
        ),
        Replacement(utils, "masked_mean", ("tensor", "mask", "dim"), always(_masked_mean)),
    ]


_BY_VERSION = {"0.11": _replacements}
