"""The loss of a minibatch, and how far the policy has moved since its rollout."""

from __future__ import annotations

import torch
from torch import Tensor

from kl_kernels import fused_policy_loss, ppo_value_loss, token_stats
from kl_kernels.algebra.epilogues import k3_of
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.policy import Policy
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.reference import Reference
from kl_kernels.lab.ppo.rollout import Batch
from kl_kernels.rl.log_ratio import masked_log_ratio

# Rounding moves a log-probability by 1e-5 or so when the same row is computed in another batch;
# dropout, a wrong position or an unmasked pad move it by 0.1 and more.
RATIO_TOLERANCE = 1e-3
KL_TOLERANCE = 1e-4  # nats per token


def ppo_loss(
    config: PPOConfig,
    policy: Policy,
    reference: Reference,
    batch: Batch,
    kl_loss_coef: float,
    ranks: Ranks,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped policy loss + KL to the reference + value loss, and what they were made of.

    Each logit of both models is read once for the loss and its gradient together; the reference is
    run only for an exact KL in the loss. The loss is that of this rank's rows, such that its mean
    over ranks, and so DDP's mean of gradients, is the batch's; the metrics are the batch's.
    """
    n_tokens = batch.samples.mask.sum()
    batch = batch.each(lambda tensor: tensor[ranks.rows(len(tensor))])
    samples, n_answer = batch.samples, batch.samples.mask.shape[1]
    logits, values = policy(samples.ids, samples.attention_mask, n_answer)
    sampled = config.kl_estimator == "k2"
    exact = kl_loss_coef > 0 and not sampled
    loss, metrics = fused_policy_loss(
        logits,
        samples.answers,
        batch.logprobs,
        batch.advantages,
        samples.mask,
        ref_logits=reference(samples.ids, samples.attention_mask, n_answer) if exact else None,
        ref_logprobs=batch.ref_logprobs if sampled else None,
        kl_loss_coef=kl_loss_coef,
        kl_estimator="k2" if sampled else "exact",
        clip_low=config.clip,
        clip_high=config.clip,
        denominator=n_tokens / ranks.n,
    )
    value_loss, _ = ppo_value_loss(
        values,
        batch.values,
        batch.returns,
        samples.mask,
        clip_range=config.value_clip,
        denominator=n_tokens / ranks.n,
    )
    # This rank's share of what is averaged over tokens.
    share = samples.mask.sum() / n_tokens.clamp_min(1)
    kl = metrics.get("kl", torch.zeros_like(loss))
    of_tokens = share * torch.stack([kl, metrics["approx_kl"], metrics["clip_fraction"]])
    of_ranks = torch.stack([loss.detach(), value_loss.detach()]) / ranks.n
    total = ranks.total(torch.cat([of_ranks, of_tokens]))
    policy_loss, value_loss_, kl_loss, approx_kl, clip_fraction = total.tolist()
    return loss + config.value_coef * value_loss, {
        "policy_loss": policy_loss - kl_loss_coef * kl_loss,
        "value_loss": value_loss_,
        "kl_loss": kl_loss,
        "approx_kl": approx_kl,
        "ratio_max": ranks.largest(metrics["ratio_max"]).item(),
        "clip_fraction": clip_fraction,
    }


@torch.no_grad()
def moved(config: PPOConfig, policy: Policy, batch: Batch, ranks: Ranks) -> tuple[float, float]:
    """Mean KL(old policy || policy) in nats per token (k3), and the largest policy ratio."""
    device = batch.logprobs.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    largest = torch.ones((), device=device)
    for rows in torch.arange(len(batch.logprobs)).chunk(config.minibatches):
        part = batch.rows(rows[ranks.rows(len(rows))].to(device))
        samples = part.samples
        logits, _ = policy(samples.ids, samples.attention_mask, samples.mask.shape[1])
        logprob = token_stats(logits, samples.answers, mask=samples.mask).logprob
        log_ratio = masked_log_ratio(logprob, part.logprobs, samples.mask)
        total = total + k3_of(-log_ratio).double().sum()
        largest = torch.maximum(largest, log_ratio.exp().amax())
    kl = ranks.total(total) / batch.samples.mask.sum().clamp_min(1)
    return kl.item(), ranks.largest(largest).item()


def check_ratio(approx_kl: float, ratio_max: float) -> None:
    """Before the first step the policy is the one that sampled, so that every ratio is 1.

    Raises:
        RuntimeError: it is not; whatever makes it differ would be trained on as if it were the
            policy's doing.
    """
    # Of ratios near 1, k3 is half the mean square of what they are off by.
    for deviation in (ratio_max - 1, (2 * abs(approx_kl)) ** 0.5):
        if not deviation <= RATIO_TOLERANCE:
            raise RuntimeError(
                f"before the first step a policy ratio is off 1 by {deviation:.2g}: the loss "
                "scores answers differently from the rollout (dropout? padding? positions?)"
            )


def check_reference(kl: float) -> None:
    """Before the first step the policy is its own reference, so that no token has a KL to it.

    Raises:
        RuntimeError: one has.
    """
    if not kl <= KL_TOLERANCE:
        raise RuntimeError(
            f"before the first step a token's KL to the reference is {kl:.2g}: the reference is "
            "not a copy of the policy, or the two are run differently"
        )
