"""verl: the fused functions in the place of its own, and a policy loss under the name "kl_kernels".

    from kl_kernels.integrations import verl

    verl.patch()

A patch is in force in the process that made it, and verl computes in Ray's workers: how they all
come to be patched stands in docs/how-to/verl.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from kl_kernels.algebra.parts import any_token
from kl_kernels.checks import check_mask, check_non_negative
from kl_kernels.functional.logits import token_kl, token_stats
from kl_kernels.integrations.entropy import entropy_from_logits
from kl_kernels.integrations.patching import Patch, Replacement, always, replacements_of
from kl_kernels.integrations.verl_heads import linear_cross_entropy
from kl_kernels.integrations.verl_losses import policy_loss
from kl_kernels.rl.advantages import compute_gae
from kl_kernels.rl.estimators import KLPenalty
from kl_kernels.rl.estimators import kl_penalty as sampled_kl
from kl_kernels.rl.log_ratio import masked_log_ratio
from kl_kernels.rl.masked import masked_mean, masked_whiten
from kl_kernels.schemas import BackendName

__all__ = ["linear_cross_entropy", "patch"]

NAME = "kl_kernels"  # in verl's registries
# Bounds of k3, in nats. That of the value is verl's own. That of the log-ratio, 20 with verl,
# bounds the gradient here, by e^11: the least that leaves all of verl's values as they are, since
# at a log-ratio of 11 the policy's way k3 is 10 as well.
LOG_RATIO_CLAMP, KL_CLAMP = 11.0, 10.0

_NEEDS_VOCABULARY = (
    "the KL over the vocabulary needs [B, T, V] logits or log-probabilities, and verl's trainer "
    'keeps those of the sampled tokens alone; use "k1" in the reward, "k3+" in the loss'
)


def patch(*, backend: BackendName | None = None) -> Patch:
    """Put the fused functions in the place of the installed verl's, until the patch is undone.

    Replaced are, wherever verl has imported them: `logprobs_from_logits`, `entropy_from_logits`,
    `entropy_from_logits_with_chunking` and `masked_whiten` of verl.utils.torch_functional,
    `kl_penalty` and `compute_gae_advantage_return` of verl.trainer.ppo.core_algos, and
    `apply_kl_penalty` of verl.trainer.ppo.ray_trainer. `actor.policy_loss.loss_mode="kl_kernels"`
    then is a policy loss: verl's "vanilla" with the differences below.

    Results are verl's up to rounding, with these differences:

    - Log-probabilities, entropies and KL are float32 where verl returns bfloat16.
    - -inf logits have the entropy they have, not NaN.
    - Where verl multiplies by a mask, positions are selected: NaN at a masked position stays there.
      Advantages, returns and whitened values are exactly 0 where masked.
    - k3 ("low_var_kl") has verl's values, clamped at 10 nats, but not a gradient of 0 where they
      are clamped: it is 1 - reference / policy, with their log-ratio clamped to 11. It may be very
      large; "k3+" has a gradient of at most the log-ratio and, unlike k3, the KL's in expectation.
    - The reference never gets a gradient.
    - A token that both sides rule out (log-probability -inf) has a KL of 0, not NaN.
    - A batch without tokens leaves the KL coefficient as it is.
    - A mask that leaves one position or none whitens to 0, where verl raises ValueError.
    - A coefficient below 0, which would pay for KL, and masks that are not of 0 and 1 are refused.
    - "kl_kernels" pulls a token back whose log-ratio is beyond 20 with A < 0 (unless clip_ratio_c
      decides), a batch without tokens has loss 0, and "actor/ppo_kl_k3" is one metric more.

    `kl_penalty="full"`, which verl names and does not implement, is the exact KL of [B, T, V]
    logits (or log-probabilities, which are their own logits): [B, T], differentiable in the
    policy's. verl itself has no such tensors where it calls `kl_penalty`: the reference is another
    forward pass, of which [B, T] log-probabilities are kept. In its configuration (kl_loss_type,
    algorithm.kl_penalty) "full" is refused. Nor can GAE be in the registry of advantage estimators
    under another name than verl's: under any other, verl does not hand over the values.

    Args:
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        The patch, in force: a context manager that undoes it, with `undo()` for other places.

    Raises:
        UnsupportedVersionError: the installed verl is not 0.9, or not as it was.
    """
    return Patch(replacements_of(_BY_VERSION, "verl", backend=backend))


def _kl_penalty(backend: BackendName | None) -> Callable[..., Tensor]:
    def kl_penalty(
        logprob: Tensor,  # [...], or [B, T, V] logits for "full"
        ref_logprob: Tensor,  # the same
        kl_penalty: KLPenalty | Literal["full"],
    ) -> Tensor:
        if kl_penalty == "full":
            return _full_kl(logprob, ref_logprob, backend)
        name = kl_penalty.removesuffix("+")
        if name in ("k1", "kl") and name == kl_penalty:
            # With a gradient: verl uses this as a value and drops its graph later.
            return masked_log_ratio(logprob, ref_logprob)
        is_k3 = name in ("k3", "low_var_kl")
        return sampled_kl(
            logprob,
            ref_logprob,
            kl_penalty,
            # Straight through it would bound the gradient, which verl leaves as it is.
            log_ratio_clamp=LOG_RATIO_CLAMP if is_k3 and name == kl_penalty else None,
            kl_clamp=KL_CLAMP if is_k3 else None,
        )

    return kl_penalty


def _full_kl(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    backend: BackendName | None,
) -> Tensor:
    if logits.ndim != 3:
        raise ValueError(
            f'kl_penalty is "full" and logprob has shape {tuple(logits.shape)}; {_NEEDS_VOCABULARY}'
        )
    return token_kl(logits, ref_logits.detach(), any_token(logits), backend=backend).kl


def _apply_kl_penalty(
    data: Any,  # a DataProto
    kl_ctrl: Any,
    kl_penalty: KLPenalty | Literal["full"] = "kl",
) -> tuple[Any, dict[str, float]]:
    """Set the rewards, token_level_scores - beta KL, and update the controller."""
    batch = data.batch
    mask = check_mask("response_mask", batch["response_mask"])
    if kl_penalty == "full":
        raise ValueError(f'kl_penalty is "full"; {_NEEDS_VOCABULARY}')
    is_k3 = kl_penalty.removesuffix("+") in ("k3", "low_var_kl")
    kl = sampled_kl(
        batch["old_log_probs"].detach(),
        batch["ref_log_prob"],
        kl_penalty,
        kl_clamp=KL_CLAMP if is_k3 else None,
    )
    beta = check_non_negative("kl_ctrl.value", kl_ctrl.value)
    penalty = torch.where(mask & (beta != 0), beta * kl, 0.0)
    current_kl = masked_mean(kl, mask, dim=-1).mean().item()
    if mask.any():  # a batch without tokens has no KL that beta could be steered by
        kl_ctrl.update(current_kl=current_kl, n_steps=batch.batch_size[0])
    batch["token_level_rewards"] = batch["token_level_scores"] - penalty
    return data, {
        "actor/reward_kl_penalty": current_kl,
        "actor/reward_kl_penalty_coeff": beta,
    }


def _logprobs_from_logits(backend: BackendName | None) -> Callable[..., Tensor]:
    def logprobs_from_logits(
        logits: Tensor,  # [..., V]
        labels: Tensor,  # [...]
        inplace_backward: bool = True,
    ) -> Tensor:
        return token_stats(
            logits, labels, inplace_backward=inplace_backward, backend=backend
        ).logprob

    return logprobs_from_logits


def _masked_whiten(
    values: Tensor,  # [...]
    mask: Tensor,  # [...]
    shift_mean: bool = True,
) -> Tensor:
    return masked_whiten(values, mask, shift_mean=shift_mean)


def _gae(backend: BackendName | None) -> Callable[..., tuple[Tensor, Tensor]]:
    def compute_gae_advantage_return(
        token_level_rewards: Tensor,  # [B, T]
        values: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        gamma: float,
        lam: float,
    ) -> tuple[Tensor, Tensor]:
        advantages, returns = compute_gae(
            token_level_rewards,
            values,
            response_mask,
            gamma=float(gamma),
            lam=float(lam),
            backend=backend,
        )
        return masked_whiten(advantages, response_mask), returns

    return compute_gae_advantage_return


def _found_under(name: str, found: Any) -> Callable[[Any], Any]:
    """A registry's look-up that finds `found` under `name` as well; the registry stays as it is."""

    def make(original: Any) -> Any:
        def look_up(*args: Any, **keywords: Any) -> Any:
            (wanted,) = (*args, *keywords.values())  # its name is the look-up's own
            is_it = getattr(wanted, "value", wanted) == name
            return found if is_it else original(*args, **keywords)

        return look_up

    return make


def _replacements(backend: BackendName | None) -> Sequence[Replacement]:
    """Return the replacements for 0.9."""
    functional, core = "verl.utils.torch_functional", "verl.trainer.ppo.core_algos"
    gae = _gae(backend)
    return [
        Replacement(
            functional,
            "logprobs_from_logits",
            ("logits", "labels", "inplace_backward"),
            always(_logprobs_from_logits(backend)),
        ),
        Replacement(
            functional, "entropy_from_logits", ("logits",), always(entropy_from_logits(backend))
        ),
        Replacement(
            functional,
            "entropy_from_logits_with_chunking",
            ("logits", "chunk_size"),
            always(entropy_from_logits(backend)),
        ),
        Replacement(
            functional, "masked_whiten", ("values", "mask", "shift_mean"), always(_masked_whiten)
        ),
        Replacement(
            core,
            "kl_penalty",
            ("logprob", "ref_logprob", "kl_penalty"),
            always(_kl_penalty(backend)),
        ),
        Replacement(
            core,
            "compute_gae_advantage_return",
            ("token_level_rewards", "values", "response_mask", "gamma", "lam"),
            always(gae),
        ),
        Replacement(core, "get_adv_estimator_fn", ("name_or_enum",), _found_under("gae", gae)),
        Replacement(core, "get_policy_loss_fn", ("name",), _found_under(NAME, policy_loss)),
        Replacement(
            "verl.trainer.ppo.ray_trainer",
            "apply_kl_penalty",
            ("data", "kl_ctrl", "kl_penalty"),
            always(_apply_kl_penalty),
        ),
    ]


_BY_VERSION = {"0.9": _replacements}
