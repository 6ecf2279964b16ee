"""The KL-regularised policy gradient of every form of the penalty, by exact enumeration."""

import pytest
import torch

from kl_kernels import compute_rewards, kl_rewards
from kl_kernels.lab.study.tree import BETA, T, disagreement, make_tree

TREES = {"full": make_tree(early_eos=False), "early_eos": make_tree(early_eos=True)}


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
    [
        ("k1", {}),
        ("k1", {"correct": True}),
        ("exact", {"correct": True}),
        ("exact", {"kl_in_loss": True}),
    ],
    ids=["k1", "k1_corrected_by_nothing", "exact_and_correction", "exact_and_kl_in_loss"],
)
def test_offered_combinations_have_the_true_gradient(tree, kl_estimator, options):
    error, _ = disagreement(tree.gradient(kl_estimator, **options), tree.true_gradient())
    assert error < 1e-13


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    ("kl_estimator", "options"),
    [
        ("exact", {}),
        ("k2", {}),
        ("k3", {}),
        ("abs", {}),
        ("k1", {"kl_in_loss": True}),
        ("exact", {"correct": True, "kl_in_loss": True}),
    ],
    ids=["exact_alone", "k2", "k3", "abs", "k1_and_kl_in_loss", "exact_corrected_twice"],
)
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
            tree.padded(tree.policy),
            tree.padded(tree.reference),
            tree.tokens,
            tree.scores,
            tree.mask,
            kl_coef=BETA,
            kl_estimator=kl_estimator,
            score_position=score_position,
            score_clip=1.5,
        )
        kl = out.kl if kl_estimator == "exact" else out.logprob - out.ref_logprob
        kl = torch.where(tree.mask, kl, torch.nan)
        rewards = compute_rewards(
            tree.scores, kl, tree.mask, BETA, score_position=score_position, score_clip=1.5
        )
        torch.testing.assert_close(rewards, out.rewards, rtol=1e-14, atol=1e-14)
