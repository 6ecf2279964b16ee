"""One rollout: answers, their scores, and what each of their tokens is taught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kl_kernels import (
    KLRewards,
    compute_gae,
    kl_rewards,
    length_normalized_scores,
    masked_var,
    masked_whiten,
    missing_eos_penalty,
    overlong_penalty,
)
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.policy import Policy, Samples
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.reference import Reference


@dataclass(frozen=True)
class Batch:
    """Everything the optimisation of one update needs, a row per answer, of all ranks."""

    samples: Samples
    logprobs: Tensor  # [B, T] under the policy that sampled them
    ref_logprobs: Tensor  # [B, T] under the reference
    values: Tensor  # [B, T]
    advantages: Tensor  # [B, T] whitened
    returns: Tensor  # [B, T]

    def each(self, f: Callable[[Tensor], Tensor]) -> Batch:
        rest = (self.logprobs, self.ref_logprobs, self.values, self.advantages, self.returns)
        return Batch(self.samples.each(f), *map(f, rest))

    def rows(self, rows: Tensor) -> Batch:  # [b] int64
        return self.each(lambda tensor: tensor[rows])


def shape_scores(
    config: PPOConfig,
    scores: Tensor,  # [B]
    samples: Samples,
    eos: int,
) -> Tensor:  # [B]
    """Scores as the policy is paid them: by length, clipped, less the price of not ending."""
    mask = samples.mask
    scores = length_normalized_scores(scores, mask, exponent=config.length_exponent)
    if config.score_clip:
        scores = scores.clamp(-config.score_clip, config.score_clip)
    if config.missing_eos_penalty:
        ended = ((samples.answers == eos) & mask).any(1)
        scores = missing_eos_penalty(
            scores, ended, config.missing_eos_penalty, mode=config.missing_eos
        )
    if config.overlong_buffer:
        scores = scores + overlong_penalty(
            mask.sum(1), config.answer_tokens, config.overlong_buffer, factor=config.overlong_factor
        )
    return scores


@torch.no_grad()
def shape_rewards(
    config: PPOConfig,
    policy: Policy,
    reference: Reference,
    samples: Samples,
    scores: Tensor,  # [B]
    kl_coef: float,
) -> tuple[KLRewards, Tensor]:
    """Rewards, KL and log-probabilities of the samples, and their values [B, T].

    Log-probabilities are recomputed instead of taken from `generate`, whose cached keys round
    differently. A minibatch at a time, so that memory is that of an optimisation step.
    """
    pieces, values = [], []
    n_answer = samples.mask.shape[1]
    for rows in torch.arange(len(scores)).chunk(config.minibatches):
        part = samples.rows(rows.to(samples.ids.device))
        logits, value = policy(part.ids, part.attention_mask, n_answer)
        pieces.append(
            kl_rewards(
                logits,
                reference(part.ids, part.attention_mask, n_answer),
                part.answers,
                scores[rows],
                part.mask,
                kl_coef=kl_coef if config.kl_in == "reward" else 0.0,
                kl_estimator="k1" if config.kl_estimator == "k1" else "exact",
                kl_clip=config.kl_clip or None,
            )
        )
        values.append(value)
    return KLRewards(*map(torch.cat, zip(*pieces))), torch.cat(values)


def teach(
    config: PPOConfig,
    samples: Samples,
    shaped: KLRewards,
    values: Tensor,  # [B, T]
    ranks: Ranks,
) -> tuple[Batch, float]:
    """Whitened advantages and returns, and how many of their units one of the scores' makes.

    Whitening measures rewards in standard deviations; so must a KL in the loss be measured.
    """
    mask, rewards = samples.mask, shaped.rewards
    per_unit = 1.0
    if config.whiten_rewards:
        per_unit = _per_sd(rewards, mask, ranks)
        rewards = masked_whiten(rewards, mask, shift_mean=False, group=ranks.group)
    advantages, returns = compute_gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
    if config.corrects_advantages:
        advantages = advantages + per_unit * shaped.advantage_correction
    per_unit *= _per_sd(advantages, mask, ranks)
    advantages = masked_whiten(advantages, mask, group=ranks.group)
    batch = Batch(samples, shaped.logprob, shaped.ref_logprob, values, advantages, returns)
    return batch.each(ranks.all_rows), per_unit


def _per_sd(x: Tensor, mask: Tensor, ranks: Ranks) -> float:
    return 1 / masked_var(x, mask, group=ranks.group).sqrt().clamp_min(1e-8).item()
