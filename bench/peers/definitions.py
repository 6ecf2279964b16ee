"""The definitions of what is compared: statistics of logits, rewards, advantages, losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Results = dict[str, Tensor]
KL_COEF, LOSS_KL_COEF, ENTROPY_COEF, CLIP, GAMMA, LAM = 0.1, 0.1, 0.01, 0.2, 1.0, 0.95
JSD_BETA = 0.5


@dataclass(frozen=True)
class Size:
    rows: int
    vocab_size: int = 0  # 0: the operation has no vocabulary
    width: int = 0  # 0: the operation starts from logits

    def __str__(self) -> str:
        return " x ".join(str(n) for n in (self.rows, self.vocab_size, self.width) if n)


class Sampled(Protocol):
    """Numbers beside sampled tokens that losses take."""

    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]
    advantages: Tensor  # [B]


def statistics(
    logits: Tensor,  # [..., V]
    ref_logits: Tensor,  # [..., V]
    token_ids: Tensor,  # [...]
) -> Results:
    """Compute the outputs of `token_kl` by their definitions."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    p, q, here = log_p.exp(), log_q.exp(), token_ids[..., None]
    return {
        "logprob": log_p.gather(-1, here).squeeze(-1),
        "ref_logprob": log_q.gather(-1, here).squeeze(-1),
        "kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
    }


def policy_statistics(logits: Tensor, token_ids: Tensor) -> Results:  # [..., V], [...]
    log_p = logits.log_softmax(-1)
    return {
        "logprob": log_p.gather(-1, token_ids[..., None]).squeeze(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
    }


def jensen_shannon(logits: Tensor, ref_logits: Tensor) -> Results:  # [..., V] each
    """Compute the JSD at JSD_BETA as distillation trainers do: kl_div to a logaddexp mixture."""
    log_p, log_q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(1 - JSD_BETA), log_q + math.log(JSD_BETA))
    of_p, of_q = (
        torch.nn.functional.kl_div(log_m, log_r, reduction="none", log_target=True).sum(-1)
        for log_r in (log_p, log_q)
    )
    return {"jsd": (1 - JSD_BETA) * of_p + JSD_BETA * of_q}


def shaped_rewards(logprob: Tensor, ref_logprob: Tensor, scores: Tensor) -> Tensor:
    """-beta k1, and the score at the last token; [B, T] from [B, T], [B, T] and [B]."""
    rewards = -KL_COEF * (logprob - ref_logprob)
    rewards[:, -1] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # [B, T] each
    """The loop that trainers have: advantages and returns. Masked tokens are skipped."""
    on = mask.to(rewards.dtype)
    next_value = running = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        running = on[:, t] * (delta + GAMMA * LAM * running) + (1 - on[:, t]) * running
        next_value = on[:, t] * values[:, t] + (1 - on[:, t]) * next_value
        advantages.append(running)
    result = torch.stack(advantages[::-1], 1)
    return result, result + values


def whiten(x: Tensor) -> Tensor:
    return (x - x.mean()) * torch.rsqrt(x.var() + 1e-8)


def clipped_loss(logprob: Tensor, old_logprob: Tensor, advantages: Tensor) -> Tensor:
    """PPO's loss per token."""
    ratio = (logprob - old_logprob).exp()
    return -torch.min(ratio * advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * advantages)


def k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    return torch.expm1(ref_logprob - logprob) - (ref_logprob - logprob)


def grpo_loss(logprob: Tensor, x: Sampled) -> Tensor:
    loss = clipped_loss(logprob, x.old_logprobs, x.advantages[:, None])
    return (loss + LOSS_KL_COEF * k3(logprob, x.ref_logprobs)).mean()


def kl_loss(stats: Results, x: Sampled) -> Tensor:
    loss = clipped_loss(stats["logprob"], x.old_logprobs, x.advantages[:, None])
    return (loss + LOSS_KL_COEF * stats["kl"] - ENTROPY_COEF * stats["entropy"]).mean()


def with_means(stats: Results) -> Results:
    return stats | {f"mean_{name}": v.mean() for name, v in stats.items()}


NOT_DIFFERENTIATED = ("ref_logprob", "forward_kl")  # by contenders that return more than these


def with_gradients(results: Results, *sources: Tensor) -> Results:
    """The gradient of the sum of the results, where there is one, in each source that wants it."""
    if not (wanted := [source for source in sources if source.requires_grad]):
        return results
    total = sum(
        v.sum() for name, v in results.items() if v.requires_grad and name not in NOT_DIFFERENTIATED
    )
    names = ("gradient", "weight_gradient")
    return results | dict(zip(names, torch.autograd.grad(total, wanted)))
