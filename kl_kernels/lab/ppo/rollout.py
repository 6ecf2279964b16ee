"""One rollout: shaped scores, the KL rewards of every token, and the advantages they make."""

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
from kl_kernels.lab.ppo.policy import Policy, Samples
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.ref_model import RefModel
from kl_kernels.rl.scores import MissingEOS


@dataclass(frozen=True)
class Batch:
    """Everything that the steps of one update need, a row per answer, of all ranks."""

    samples: Samples
    logprobs: Tensor  # [B, T] under the policy that sampled them
    ref_logprobs: Tensor  # [B, T] under the reference
    values: Tensor  # [B, T]
    advantages: Tensor  # [B, T] whitened
    returns: Tensor  # [B, T]

    def map(self, f: Callable[[Tensor], Tensor]) -> Batch:
        rest = (self.logprobs, self.ref_logprobs, self.values, self.advantages, self.returns)
        return Batch(self.samples.map(f), *map(f, rest))

    def select(self, rows: Tensor) -> Batch:  # [b] int64
        return self.map(lambda tensor: tensor[rows])


@dataclass(frozen=True)
class ScoreConstants:
    """Constants of `shape_scores`, as `PPOConfig` has them."""

    length_exponent: float
    score_clip: float
    missing_eos_penalty: float
    missing_eos: MissingEOS
    answer_tokens: int
    overlong_buffer: int
    overlong_factor: float


def shape_scores(
    scores: Tensor,  # [B]
    samples: Samples,
    eos: int,
    constants: ScoreConstants,
) -> Tensor:  # [B]
    """Normalise scores by length, clip them, and subtract penalties for how answers end."""
    mask = samples.mask
    scores = length_normalized_scores(scores, mask, exponent=constants.length_exponent)
    if constants.score_clip:
        scores = scores.clamp(-constants.score_clip, constants.score_clip)
    if constants.missing_eos_penalty:
        ended = ((samples.answers == eos) & mask).any(1)
        scores = missing_eos_penalty(
            scores, ended, constants.missing_eos_penalty, mode=constants.missing_eos
        )
    if constants.overlong_buffer:
        scores = scores + overlong_penalty(
            mask.sum(1),
            constants.answer_tokens,
            constants.overlong_buffer,
            factor=constants.overlong_factor,
        )
    return scores


@dataclass(frozen=True)
class KLRewardConstants:
    """Constants of `compute_kl_rewards`, as `PPOConfig` has them."""

    kl_in: str
    kl_estimator: str
    kl_clip: float
    minibatches: int


@torch.no_grad()
def compute_kl_rewards(
    policy: Policy,
    ref_model: RefModel,
    samples: Samples,
    scores: Tensor,  # [B]
    kl_coef: float,
    constants: KLRewardConstants,
) -> tuple[KLRewards, Tensor]:
    """Compute rewards, KL and log-probabilities of the samples, and their values [B, T].

    Log-probabilities are recomputed instead of taken from `generate`, whose cached keys round
    differently. A minibatch at a time, so that memory is that of an optimisation step.
    """
    pieces, values = [], []
    n_answer = samples.mask.shape[1]
    for rows in torch.arange(len(scores)).chunk(constants.minibatches):
        part = samples.select(rows.to(samples.ids.device))
        logits, value = policy(part.ids, part.attention_mask, n_answer)
        pieces.append(
            kl_rewards(
                logits,
                ref_model(part.ids, part.attention_mask, n_answer),
                part.answers,
                scores[rows],
                part.mask,
                kl_coef=kl_coef if constants.kl_in == "reward" else 0.0,
                kl_estimator="k1" if constants.kl_estimator == "k1" else "exact",
                kl_clip=constants.kl_clip or None,
            )
        )
        values.append(value)
    return KLRewards(*map(torch.cat, zip(*pieces))), torch.cat(values)


@dataclass(frozen=True)
class AdvantageConstants:
    """Constants of `compute_advantages`, as `PPOConfig` has them."""

    gamma: float
    lam: float
    whiten_rewards: bool
    corrects_advantages: bool


def compute_advantages(
    samples: Samples,
    rollout: KLRewards,
    values: Tensor,  # [B, T]
    ranks: Ranks,
    constants: AdvantageConstants,
) -> tuple[Batch, float]:
    """Compute whitened advantages, returns, and the whitened units in one unit of the score.

    Whitening measures rewards in standard deviations, so a KL in the loss must be measured in them,
    too: its coefficient is multiplied by that number.
    """
    mask, rewards = samples.mask, rollout.rewards
    units_per_score = 1.0
    if constants.whiten_rewards:
        units_per_score = _inverse_std(rewards, mask, ranks)
        rewards = masked_whiten(rewards, mask, shift_mean=False, group=ranks.group)
    advantages, returns = compute_gae(
        rewards, values, mask, gamma=constants.gamma, lam=constants.lam
    )
    if constants.corrects_advantages:
        advantages = advantages + units_per_score * rollout.advantage_correction
    units_per_score *= _inverse_std(advantages, mask, ranks)
    advantages = masked_whiten(advantages, mask, group=ranks.group)
    batch = Batch(samples, rollout.logprob, rollout.ref_logprob, values, advantages, returns)
    return batch.map(ranks.gather), units_per_score


def _inverse_std(x: Tensor, mask: Tensor, ranks: Ranks) -> float:
    return 1 / masked_var(x, mask, group=ranks.group).sqrt().clamp_min(1e-8).item()
