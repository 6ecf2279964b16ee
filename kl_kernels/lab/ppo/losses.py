"""The loss of a minibatch, and the distance of the policy from its rollout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kl_kernels import fused_policy_loss, ppo_value_loss, token_stats
from kl_kernels.algebra.epilogues import k3_of
from kl_kernels.lab.ppo.policy import Policy
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.ref_model import RefModel
from kl_kernels.lab.ppo.rollout import Batch
from kl_kernels.rl.log_ratio import masked_log_ratio

# Rounding moves a log-probability by 1e-5 or so when the same row is computed in another batch;
# dropout, a wrong position or an unmasked pad move it by 0.1 and more.
RATIO_TOLERANCE = 1e-3
KL_TOLERANCE = 1e-4  # nats per token


@dataclass(frozen=True)
class LossConstants:
    """Constants of `ppo_loss`, as `PPOConfig` has them."""

    clip: float
    value_clip: float
    value_coef: float
    kl_estimator: str


def ppo_loss(
    policy: Policy,
    ref_model: RefModel,
    batch: Batch,
    ranks: Ranks,
    kl_loss_coef: float,
    constants: LossConstants,
) -> tuple[Tensor, dict[str, float]]:
    """Compute clipped policy loss + KL to the reference + value loss, and their metrics.

    Each logit of both models is read once for the loss and its gradient together; the reference is
    run only for an exact KL in the loss. The loss is that of the local rows, such that its mean
    over ranks, and so DDP's mean of gradients, is the batch's; the metrics are the batch's.
    """
    n_tokens = batch.samples.mask.sum()
    batch = batch.map(lambda tensor: tensor[ranks.local_rows(len(tensor))])
    samples, n_answer = batch.samples, batch.samples.mask.shape[1]
    logits, values = policy(samples.ids, samples.attention_mask, n_answer)
    is_k2 = constants.kl_estimator == "k2"
    is_exact = kl_loss_coef > 0 and not is_k2
    loss, metrics = fused_policy_loss(
        logits,
        samples.answers,
        batch.logprobs,
        batch.advantages,
        samples.mask,
        ref_logits=ref_model(samples.ids, samples.attention_mask, n_answer) if is_exact else None,
        ref_logprobs=batch.ref_logprobs if is_k2 else None,
        kl_loss_coef=kl_loss_coef,
        kl_estimator="k2" if is_k2 else "exact",
        clip_low=constants.clip,
        clip_high=constants.clip,
        denominator=n_tokens / ranks.world_size,
    )
    value_loss, _ = ppo_value_loss(
        values,
        batch.values,
        batch.returns,
        samples.mask,
        clip_range=constants.value_clip,
        denominator=n_tokens / ranks.world_size,
    )
    # Means over tokens count by the local share of them, sums of the loss as they are.
    token_share = samples.mask.sum() / n_tokens.clamp_min(1)
    kl = metrics.get("kl", torch.zeros_like(loss))
    token_means = token_share * torch.stack([kl, metrics["approx_kl"], metrics["clip_fraction"]])
    losses = torch.stack([loss.detach(), value_loss.detach()]) / ranks.world_size
    batch_means = ranks.sum(torch.cat([losses, token_means])).tolist()
    policy_loss, batch_value_loss, kl_loss, approx_kl, clip_fraction = batch_means
    return loss + constants.value_coef * value_loss, {
        "policy_loss": policy_loss - kl_loss_coef * kl_loss,
        "value_loss": batch_value_loss,
        "kl_loss": kl_loss,
        "approx_kl": approx_kl,
        "ratio_max": ranks.max(metrics["ratio_max"]).item(),
        "clip_fraction": clip_fraction,
    }


@torch.no_grad()
def kl_after_update(
    policy: Policy, batch: Batch, minibatches: int, ranks: Ranks
) -> tuple[float, float]:
    """Measure KL(old policy || policy) in nats per token (k3), and the largest policy ratio."""
    device = batch.logprobs.device
    kl_sum = torch.zeros((), dtype=torch.float64, device=device)
    ratio_max = torch.ones((), device=device)
    for rows in torch.arange(len(batch.logprobs)).chunk(minibatches):
        part = batch.select(rows[ranks.local_rows(len(rows))].to(device))
        samples = part.samples
        logits, _ = policy(samples.ids, samples.attention_mask, samples.mask.shape[1])
        logprob = token_stats(logits, samples.answers, mask=samples.mask).logprob
        log_ratio = masked_log_ratio(logprob, part.logprobs, samples.mask)
        kl_sum = kl_sum + k3_of(-log_ratio).double().sum()
        ratio_max = torch.maximum(ratio_max, log_ratio.exp().amax())
    kl = ranks.sum(kl_sum) / batch.samples.mask.sum().clamp_min(1)
    return kl.item(), ranks.max(ratio_max).item()


def check_initial_ratio(approx_kl: float, ratio_max: float) -> None:
    """Check that before the first step, every ratio of the policy to its rollout is 1.

    Raises:
        RuntimeError: one is not; the error that causes it would be trained on as if the policy had
            changed.
    """
    # Near a ratio of 1, k3 is half the mean square of the ratios' deviations.
    for deviation in (ratio_max - 1, (2 * abs(approx_kl)) ** 0.5):
        if not deviation <= RATIO_TOLERANCE:
            raise RuntimeError(
                f"before the first step a policy ratio is off 1 by {deviation:.2g}: the loss "
                "scores answers differently from the rollout (dropout? padding? positions?)"
            )


def check_initial_kl(kl: float) -> None:
    """Check that before the first step, no token has a KL to the reference.

    Raises:
        RuntimeError: one has.
    """
    if not kl <= KL_TOLERANCE:
        raise RuntimeError(
            f"before the first step a token's KL to the reference is {kl:.2g}: the reference is "
            "not a copy of the policy, or the two are run differently"
        )
