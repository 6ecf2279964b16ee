"""The KL-regularised policy gradient, by exact enumeration over a small tree, float64.

Every response of a tree with V tokens and at most T steps is a row of one batch, weighted with its
probability, and goes through the functions a trainer would call: `kl_rewards`, `compute_gae`,
`ppo_policy_loss`. The result is compared with autograd of E[score] - beta KL(sequence), written
down without them.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kl_kernels import compute_gae, kl_rewards, ppo_policy_loss
from kl_kernels.schemas import Estimator

V, T, BETA = 4, 3, 0.7
EOS = 0

# Forms of the KL penalty, and how `Tree.gradient` is asked for them.
FORMS: dict[str, dict[str, Any]] = {
    "k1 in the reward": {"kl_estimator": "k1"},
    "exact in the reward, advantage_correction": {"kl_estimator": "exact", "correct": True},
    "exact in the reward, differentiable KL in the loss": {
        "kl_estimator": "exact",
        "kl_in_loss": True,
    },
    "exact in the reward, alone": {"kl_estimator": "exact"},
    "k2 in the reward": {"kl_estimator": "k2"},
    "k3 in the reward": {"kl_estimator": "k3"},
}


@dataclass(frozen=True)
class Tree:
    """A tabular policy and reference: one row of logits for each prefix."""

    policy: Tensor  # [S, V], requires grad
    reference: Tensor  # [S, V]
    states: Tensor  # [B, T] the row of each step's prefix
    tokens: Tensor  # [B, T]
    mask: Tensor  # [B, T]
    scores: Tensor  # [B]

    def padded(self, table: Tensor) -> Tensor:  # [B, T, V]
        """The logits of every step, NaN after the end of a response."""
        return torch.where(self.mask[..., None], table[self.states], torch.nan)

    def sequence_logprob(self, table: Tensor) -> Tensor:  # [B]
        steps = table.log_softmax(-1)[self.states, self.tokens]
        return torch.where(self.mask, steps, 0.0).sum(1)

    def true_gradient(self) -> Tensor:
        """Differentiate E[score] - beta sum p (log p - log q) over responses, through p as well."""
        logprob, ref_logprob = map(self.sequence_logprob, (self.policy, self.reference))
        objective = logprob.exp() * (self.scores - BETA * (logprob - ref_logprob))
        return torch.autograd.grad(objective.sum(), self.policy)[0]

    def gradient(
        self, kl_estimator: Estimator, *, correct: bool = False, kl_in_loss: bool = False
    ) -> Tensor:
        """The expected policy gradient of a trainer that has the KL in this form."""
        out = kl_rewards(
            self.padded(self.policy),
            self.padded(self.reference),
            self.tokens,
            self.scores,
            self.mask,
            kl_coef=BETA,
            kl_estimator=kl_estimator,
            biased=True,
        )
        advantages, _ = compute_gae(
            out.rewards, torch.zeros_like(out.rewards), self.mask, gamma=1.0, lam=1.0
        )
        if correct:
            advantages = advantages + out.advantage_correction
        probability = self.sequence_logprob(self.policy).exp().detach()[:, None]
        loss, _ = ppo_policy_loss(
            out.logprob,
            out.logprob.detach(),
            advantages,
            self.mask,
            weights=probability.expand(self.mask.shape),
            aggregation="seq-mean-token-sum",
            denominator=1,
        )
        if kl_in_loss:
            loss = loss + BETA * (probability * out.kl).sum()
        return -torch.autograd.grad(loss, self.policy)[0]


def make_tree(*, early_eos: bool) -> Tree:
    """Build a tree. Without `early_eos` all V^T responses have T tokens; with it EOS ends them."""
    g = torch.Generator().manual_seed(3)
    prefixes = [p for t in range(T) for p in itertools.product(range(V), repeat=t)]
    state_of = {prefix: i for i, prefix in enumerate(prefixes)}
    responses = list(itertools.product(range(V), repeat=T))
    if early_eos:
        until_eos = (r[: r.index(EOS) + 1] if EOS in r else r for r in responses)
        responses = list(dict.fromkeys(until_eos))
    states, tokens, mask = (torch.zeros(len(responses), T, dtype=torch.long) for _ in range(3))
    for b, response in enumerate(responses):
        for t, token in enumerate(response):
            states[b, t], tokens[b, t], mask[b, t] = state_of[response[:t]], token, 1
    logits = torch.randn(2, len(prefixes), V, generator=g, dtype=torch.float64)
    # Scores are multiples of 1/8, which float32 holds exactly.
    scores = torch.randint(-16, 17, (len(responses),), generator=g).double() / 8
    return Tree(logits[0].requires_grad_(), logits[1], states, tokens, mask.bool(), scores)


def disagreement(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error and cosine."""
    cosine = torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
    return float((actual - expected).norm() / expected.norm()), float(cosine)


def compare_forms() -> dict[str, dict[str, float]]:
    """Each form's expected policy gradient beside that of the objective, on the full tree."""
    tree = make_tree(early_eos=False)
    expected = tree.true_gradient()
    found = {}
    for name, options in FORMS.items():
        error, cosine = disagreement(tree.gradient(**options), expected)
        found[name] = {"relative_error": error, "cosine": cosine}
    return found
