"""The operations that are compared: inputs, names of results, and the truth in float64.

A contender gets the inputs and returns a dict of results by name. It may return fewer than all of
an operation's results (few peers have all of them); those it returns must be right. Names that
begin with "mean" are for peers that give one number for all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bench.peers.definitions import (
    Results,
    Size,
    clipped_loss,
    gae,
    grpo_loss,
    jensen_shannon,
    kl_loss,
    shaped_rewards,
    statistics,
    whiten,
    with_gradients,
    with_means,
)
from bench.peers.heads import jsd_truth as linear_jsd_truth
from bench.peers.heads import kl_truth, loss_truth, make_heads, stats_truth

LOGITS_CHECKED = 1 << 24  # at most: a float64 truth of more would take minutes


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


def make_gae(size: Size, dtype: torch.dtype, device: str) -> GAEInputs:
    """Responses of 1024 tokens, or one if there are fewer."""
    shape = (max(1, size.rows // 1024), min(size.rows, 1024))
    generator = torch.Generator(device).manual_seed(0)
    rewards, values = (
        torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    return GAEInputs(rewards, values, torch.ones(shape, dtype=torch.bool, device=device))


def wide(x: Inputs) -> Inputs:
    """Return the inputs in float64."""
    raised = [
        t.detach().double() if t.is_floating_point() else t for t in list(vars(x).values())[:9]
    ]
    return Inputs(raised[0].requires_grad_(), *raised[1:])


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
                  make_heads, stats_truth, 0, HEAD),
        Operation("linear exact KL", "the same with the exact KL to a reference's head",
                  make_heads, kl_truth, 0, HEAD),
        Operation("linear JSD", "Jensen-Shannon divergence of two linear heads, beta = 1/2, and "
                  "both gradients", make_heads, linear_jsd_truth, 0, HEAD),
        Operation("linear policy loss", "GRPO's clipped loss with a k3 penalty, from hidden states "
                  "and the head, and both gradients", make_heads, loss_truth, 0, HEAD),
        Operation("GAE", "advantages and returns, responses of 1024 tokens",
                  make_gae, gae_truth, 0),
        Operation("PPO step", "all between logits and gradient of an update: log-probabilities of "
                  "both models, rewards, GAE, whitening, clipped loss, its gradient, entropy",
                  make_inputs, ppo_truth, 4, LOGITS),
    )
}  # fmt: skip
