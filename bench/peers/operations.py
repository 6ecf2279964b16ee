"""The operations that are compared: inputs, names of results, and the truth in float64.

A contender gets the inputs and returns a dict of results by name. It may return fewer than all of
an operation's results (few peers have all of them); those it returns must be right. Names that
begin with "mean" are for peers that give one number for all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Results = dict[str, Tensor]
KL_COEF, LOSS_KL_COEF, ENTROPY_COEF, CLIP, GAMMA, LAM = 0.1, 0.1, 0.01, 0.2, 1.0, 0.95
JSD_BETA = 0.5
LOGITS_CHECKED = 1 << 24  # at most: a float64 truth of more would take minutes


@dataclass(frozen=True)
class Size:
    rows: int
    vocab_size: int = 0  # 0: the operation has no vocabulary
    width: int = 0  # 0: the operation starts from logits

    def __str__(self) -> str:
        return " x ".join(str(n) for n in (self.rows, self.vocab_size, self.width) if n)


@dataclass(frozen=True)
class Inputs:
    """Tokens of B responses of T tokens: the policy's and the reference's logits, and the rest."""

    logits: Tensor  # [B, T, V], requires grad
    ref_logits: Tensor  # [B, T, V]
    token_ids: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]
    ref_logprobs: Tensor  # [B, T]
    values: Tensor  # [B, T]
    scores: Tensor  # [B]
    advantages: Tensor  # [B]  as GRPO has them, one for a response
    mask: Tensor  # [B, T] bool, all True: what is timed is the work on whole batches

    @cached_property
    def overwritten(self) -> Tensor:  # [B, T, V], requires grad
        """Logits for those who write the gradient over them: right in the first call only."""
        return self.logits.detach().clone().requires_grad_()

    @cached_property
    def with_prompt(self) -> Tensor:  # [B, T + 1, V], requires grad
        """Logits with one more position, for contenders that cut it off themselves."""
        return torch.cat([self.logits, self.logits[:, -1:]], 1).detach().requires_grad_()

    def head(self) -> Inputs:
        """Return as many of the first responses' first tokens as can be checked."""
        B, T, V = self.logits.shape
        rows = max(1, LOGITS_CHECKED // V)
        b, t = (B, min(T, rows // B)) if rows >= B else (1, min(T, rows))
        if (b, t) == (B, T):
            return self

        def cut(x: Tensor) -> Tensor:
            return x[:b] if x.ndim == 1 else x[:b, :t].contiguous()

        logits = cut(self.logits.detach()).requires_grad_()
        return Inputs(logits, *map(cut, list(vars(self).values())[1:9]))


@dataclass(frozen=True)
class HeadInputs:
    """Hidden states and heads of two models. Logits are about unit size."""

    hidden: Tensor  # [T, d], requires grad
    weight: Tensor  # [V, d], requires grad
    ref_hidden: Tensor  # [T, d]
    ref_weight: Tensor  # [V, d]
    token_ids: Tensor  # [T]

    def head(self) -> HeadInputs:
        return self


@dataclass(frozen=True)
class GAEInputs:
    rewards: Tensor  # [B, T]
    values: Tensor  # [B, T]
    mask: Tensor  # [B, T]

    def head(self) -> GAEInputs:
        return self


def make_inputs(size: Size, dtype: torch.dtype, device: str) -> Inputs:
    """A policy not far from its reference, sampled tokens, and probability ratios near 1."""
    n_responses = max(1, min(4, size.rows // 16))
    shape = (n_responses, size.rows // n_responses)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    logits, ref_logits = (
        torch.empty(*shape, size.vocab_size, dtype=dtype, device=device) for _ in range(2)
    )
    token_ids = torch.empty(shape, dtype=torch.int64, device=device)
    logprobs, ref_logprobs = (torch.empty(shape, device=device) for _ in range(2))
    for b in range(n_responses):
        for t in range(0, shape[1], 64):  # no float32 copy of it all
            part = b, slice(t, t + 64)
            y = 3 * normal(*ref_logits[part].shape)
            x = y + 0.3 * normal(*y.shape)
            logits[part], ref_logits[part] = x, y
            ids = torch.multinomial(x.softmax(-1), 1, generator=generator)
            token_ids[part] = ids.squeeze(-1)
            for kept, given in ((logprobs, logits), (ref_logprobs, ref_logits)):
                kept[part] = given[part].float().log_softmax(-1).gather(-1, ids).squeeze(-1)
    old_logprobs = logprobs + 0.02 * normal(*shape)
    values, scores, advantages = normal(*shape), normal(n_responses), normal(n_responses)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Inputs(
        logits.requires_grad_(),
        ref_logits,
        token_ids,
        old_logprobs,
        ref_logprobs,
        values,
        scores,
        advantages,
        mask,
    )


def make_heads(size: Size, dtype: torch.dtype, device: str) -> HeadInputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal(n: int) -> Tensor:
        x = torch.randn(n, size.width, generator=generator, device=device)
        return (x * size.width**-0.25).to(dtype)

    hidden, ref_hidden = normal(size.rows), normal(size.rows)
    weight, ref_weight = normal(size.vocab_size), normal(size.vocab_size)
    token_ids = torch.randint(size.vocab_size, (size.rows,), generator=generator, device=device)
    return HeadInputs(
        hidden.requires_grad_(), weight.requires_grad_(), ref_hidden, ref_weight, token_ids
    )


def make_gae(size: Size, dtype: torch.dtype, device: str) -> GAEInputs:
    """Responses of 1024 tokens, or one if there are fewer."""
    shape = (max(1, size.rows // 1024), min(size.rows, 1024))
    generator = torch.Generator(device).manual_seed(0)
    rewards, values = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    return GAEInputs(rewards, values, torch.ones(shape, dtype=torch.bool, device=device))


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


def grpo_loss(logprob: Tensor, x: Inputs) -> Tensor:
    loss = clipped_loss(logprob, x.old_logprobs, x.advantages[:, None])
    return (loss + LOSS_KL_COEF * k3(logprob, x.ref_logprobs)).mean()


def kl_loss(stats: Results, x: Inputs) -> Tensor:
    loss = clipped_loss(stats["logprob"], x.old_logprobs, x.advantages[:, None])
    return (loss + LOSS_KL_COEF * stats["kl"] - ENTROPY_COEF * stats["entropy"]).mean()


def wide(x: Inputs) -> Inputs:
    """Return the inputs in float64."""
    raised = [
        t.detach().double() if t.is_floating_point() else t for t in list(vars(x).values())[:9]
    ]
    return Inputs(raised[0].requires_grad_(), *raised[1:])


def with_means(stats: Results) -> Results:
    return stats | {f"mean_{name}": v.mean() for name, v in stats.items()}


NOT_DIFFERENTIATED = ("ref_logprob", "forward_kl")  # by contenders that return more than these


def with_gradients(results: Results, *sources: Tensor) -> Results:
    """The gradient of the sum of the results, where there is one, in each source."""
    total = sum(
        v.sum() for name, v in results.items() if v.requires_grad and name not in NOT_DIFFERENTIATED
    )
    names = ("gradient", "weight_gradient")
    return results | dict(zip(names, torch.autograd.grad(total, sources)))


def token_truth(x: Inputs, names: Iterable[str]) -> Results:
    x = wide(x)
    with torch.no_grad():
        return with_means(statistics(x.logits, x.ref_logits, x.token_ids))


def gradient_truth(x: Inputs, names: Iterable[str]) -> Results:
    """Return the statistics, and the gradients of the sum of those in `names`."""
    x = wide(x)
    stats = with_means(statistics(x.logits, x.ref_logits, x.token_ids))
    return stats | with_gradients({name: stats[name] for name in names}, x.logits)


def jsd_truth(x: Inputs, names: Iterable[str]) -> Results:
    x = wide(x)
    with torch.no_grad():
        return with_means(jensen_shannon(x.logits, x.ref_logits))


def jsd_gradient_truth(x: Inputs, names: Iterable[str]) -> Results:
    x = wide(x)
    stats = with_means(jensen_shannon(x.logits, x.ref_logits))
    return stats | with_gradients({name: stats[name] for name in names}, x.logits)


def reward_truth(x: Inputs, names: Iterable[str]) -> Results:
    stats = token_truth(x, names)
    return {"rewards": shaped_rewards(stats["logprob"], stats["ref_logprob"], x.scores.double())}


def grpo_truth(x: Inputs, names: Iterable[str]) -> Results:
    x = wide(x)
    stats = statistics(x.logits, x.ref_logits, x.token_ids)
    return with_gradients({"loss": grpo_loss(stats["logprob"], x)}, x.logits)


def kl_loss_truth(x: Inputs, names: Iterable[str]) -> Results:
    x = wide(x)
    stats = statistics(x.logits, x.ref_logits, x.token_ids)
    return with_gradients({"loss": kl_loss(stats, x)}, x.logits)


def head_truth(x: HeadInputs, names: Iterable[str]) -> Results:
    hidden, weight, ref_hidden, ref_weight = (
        t.detach().double() for t in (x.hidden, x.weight, x.ref_hidden, x.ref_weight)
    )
    hidden.requires_grad_(), weight.requires_grad_()
    stats = with_means(statistics(hidden @ weight.T, ref_hidden @ ref_weight.T, x.token_ids))
    return stats | with_gradients({name: stats[name] for name in names}, hidden, weight)


def gae_truth(x: GAEInputs, names: Iterable[str]) -> Results:
    advantages, returns = gae(x.rewards.double(), x.values.double(), x.mask)
    return {"advantages": advantages, "returns": returns, "whitened": whiten(advantages)}


def ppo_truth(x: Inputs, names: Iterable[str]) -> Results:
    x = wide(x)
    stats = statistics(x.logits, x.ref_logits, x.token_ids)
    logprob = stats["logprob"]
    rewards = shaped_rewards(logprob.detach(), stats["ref_logprob"], x.scores)
    advantages, _ = gae(rewards, x.values, x.mask)
    loss = clipped_loss(logprob, logprob.detach(), whiten(advantages)).mean()
    entropy = stats["entropy"].detach().mean()
    return with_gradients({"rewards": rewards, "mean_entropy": entropy, "loss": loss}, x.logits)


@dataclass(frozen=True)
class Operation:
    name: str
    does: str  # description for the page
    make: Callable[[Size, torch.dtype, str], object]
    truth: Callable[..., Results]
    passes: int  # tensors of [T, V] that must pass through memory at the least; 0: not counted
    sources: tuple[str, ...] = ()  # inputs that gradients are taken in; none: no gradient
    of: str = ""  # the operation whose contenders are differentiated here


LOGITS, HEAD = ("logits",), ("hidden", "weight")
OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("token logprob", "log-probability of each sampled token",
                  make_inputs, token_truth, 1),
        Operation("token logprob + gradient", "the same, and the gradient of its sum",
                  make_inputs, gradient_truth, 3, LOGITS, of="token logprob"),
        Operation("logprob + entropy", "log-probability of each token, entropy of its distribution",
                  make_inputs, token_truth, 1),
        Operation("logprob + entropy + gradient", "the same, and the gradient of their sum",
                  make_inputs, gradient_truth, 3, LOGITS, of="logprob + entropy"),
        Operation("exact KL", "both log-probabilities, exact KL both ways, entropy",
                  make_inputs, token_truth, 2),
        Operation("exact KL + gradient", "the same, and the gradient of logprob + KL + entropy",
                  make_inputs, gradient_truth, 5, LOGITS, of="exact KL"),
        Operation("JSD", "Jensen-Shannon divergence to the reference, beta = 1/2",
                  make_inputs, jsd_truth, 2),
        Operation("JSD + gradient", "the same, and the gradient of its sum",
                  make_inputs, jsd_gradient_truth, 5, LOGITS, of="JSD"),
        Operation("shaped reward", "-beta (logprob - ref_logprob) per token, score at the last",
                  make_inputs, reward_truth, 2),
        Operation("policy loss", "GRPO's clipped loss with a k3 penalty, and its gradient",
                  make_inputs, grpo_truth, 2, LOGITS),
        Operation("policy loss with exact KL", "clipped loss, exact KL and entropy, and gradient",
                  make_inputs, kl_loss_truth, 3, LOGITS),
        Operation("linear logprob + entropy", "from hidden states and the head, and both gradients",
                  make_heads, head_truth, 0, HEAD),
        Operation("linear exact KL", "the same with the exact KL to a reference's head",
                  make_heads, head_truth, 0, HEAD),
        Operation("GAE", "advantages and returns, responses of 1024 tokens",
                  make_gae, gae_truth, 0),
        Operation("PPO step", "all between logits and gradient of an update: log-probabilities of "
                  "both models, rewards, GAE, whitening, clipped loss, its gradient, entropy",
                  make_inputs, ppo_truth, 4, LOGITS),
    )
}  # fmt: skip
