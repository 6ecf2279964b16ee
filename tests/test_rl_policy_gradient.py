"""The KL-regularised policy gradient, by exact enumeration over a small tree, float64.

Every response of a tree with V tokens and at most T steps is a row of one batch, weighted with its
probability, and goes through the functions a trainer would call: `kl_rewards`, `compute_gae`,
`ppo_policy_loss`. The result is compared with autograd of E[score] - beta KL(sequence), written
down without them.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kl_kernels import compute_gae, compute_rewards, kl_rewards, ppo_policy_loss

V, T, BETA = 4, 3, 0.7
EOS = 0


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
        """Of E[score] - beta sum p (log p - log q) over whole responses, through p as well."""
        logprob, ref_logprob = map(self.sequence_logprob, (self.policy, self.reference))
        objective = logprob.exp() * (self.scores - BETA * (logprob - ref_logprob))
        return torch.autograd.grad(objective.sum(), self.policy)[0]

    def gradient(self, kl_estimator: str, *, correct: bool = False, kl_in_loss: bool = False):
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
    """Without `early_eos` all V^T responses have T tokens; with it EOS ends a response."""
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


TREES = {"full": make_tree(early_eos=False), "early_eos": make_tree(early_eos=True)}


def disagreement(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error and cosine."""
    cosine = torch.cosine_similarity(actual.flatten(), expected.flatten(), dim=0)
    return float((actual - expected).norm() / expected.norm()), float(cosine)


def test_trees_are_whole():
    for name, n_responses in (("full", 64), ("early_eos", 1 + 3 + 36)):
        tree = TREES[name]
        assert len(tree.tokens) == n_responses
        total = tree.sequence_logprob(tree.policy.detach()).exp().sum()
        assert abs(total - 1) < 1e-14
    assert set(TREES["early_eos"].mask.sum(1).tolist()) == {1, 2, 3}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    ("kl_estimator", "options"),
    [("k1", {}), ("k1", {"correct": True}), ("exact", {"correct": True}),
     ("exact", {"kl_in_loss": True})],
    ids=["k1", "k1_corrected_by_nothing", "exact_and_correction", "exact_and_kl_in_loss"],
)  # fmt: skip
def test_offered_combinations_have_the_true_gradient(tree, kl_estimator, options):
    error, _ = disagreement(tree.gradient(kl_estimator, **options), tree.true_gradient())
    assert error < 1e-13


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    ("kl_estimator", "options"),
    [("exact", {}), ("k2", {}), ("k3", {}), ("abs", {}), ("k1", {"kl_in_loss": True}),
     ("exact", {"correct": True, "kl_in_loss": True})],
    ids=["exact_alone", "k2", "k3", "abs", "k1_and_kl_in_loss", "exact_corrected_twice"],
)  # fmt: skip
def test_other_combinations_are_clearly_wrong(tree, kl_estimator, options):
    error, cosine = disagreement(tree.gradient(kl_estimator, **options), tree.true_gradient())
    assert error > 0.2
    assert cosine < 0.99


def test_exact_kl_alone_gives_the_last_token_no_pull_back():
    """With equal scores only the KL acts; at the last step, exact KL as a reward does nothing."""
    tree = make_tree(early_eos=False)
    tree.scores.zero_()
    last_step = tree.states[:, -1].unique()
    assert tree.gradient("exact")[last_step].abs().max() < 1e-15
    assert tree.true_gradient()[last_step].abs().max() > 1e-2


@pytest.mark.parametrize("score_position", ["last_token", "index"])
def test_compute_rewards_from_the_kl_gives_the_rewards_of_kl_rewards(score_position):
    tree = TREES["early_eos"]
    if score_position == "index":
        score_position = torch.arange(len(tree.scores)) % (T + 1) - 1
    for kl_estimator in ("k1", "exact"):
        out = kl_rewards(
            tree.padded(tree.policy), tree.padded(tree.reference), tree.tokens, tree.scores,
            tree.mask, kl_coef=BETA, kl_estimator=kl_estimator, score_position=score_position,
            score_clip=1.5,
        )  # fmt: skip
        kl = out.kl if kl_estimator == "exact" else out.logprob - out.ref_logprob
        kl = torch.where(tree.mask, kl, torch.nan)
        rewards = compute_rewards(
            tree.scores, kl, tree.mask, BETA, score_position=score_position, score_clip=1.5
        )
        torch.testing.assert_close(rewards, out.rewards, rtol=1e-14, atol=1e-14)
