"""PPO steps of TRL's classic trainer with and without the fused functions."""

import math

import pytest
import torch
from tiny import assert_same_weights, folder, load_policy, make_tokenizer
from trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer

from kl_kernels.integrations import trl

__all__ = ["folder"]


def value_head(model):
    torch.manual_seed(3)
    return AutoModelForCausalLMWithValueHead.from_pretrained(model, v_head_init_strategy="normal")


def train(folder):
    torch.manual_seed(0)
    config = PPOConfig(
        batch_size=4,
        mini_batch_size=2,
        ppo_epochs=2,
        learning_rate=1e-2,
        seed=0,
        kl_penalty="kl",
        init_kl_coef=0.2,
        adap_kl_ctrl=True,
        target=0.5,
        horizon=50,
    )
    policy = value_head(load_policy(folder))
    optimizer = torch.optim.SGD(policy.parameters(), lr=1e-2)
    trainer = PPOTrainer(
        config,
        policy,
        value_head(str(folder)),
        make_tokenizer(),
        optimizer=optimizer,
    )
    generator = torch.Generator().manual_seed(2)
    stats = []
    for _ in range(4):
        queries = [torch.randint(2, 33, (4,), generator=generator) for _ in range(4)]
        responses = [torch.randint(2, 33, (n,), generator=generator) for n in (5, 7, 3, 6)]
        scores = list(torch.randn(4, generator=generator))
        stats.append(trainer.step(queries, responses, scores))
    return policy, stats


@pytest.mark.exercises("PPOTrainer.step: statistics, KL coefficient, weights")
def test_the_same_steps(folder):
    theirs, their_stats = train(folder)
    with trl.patch():
        ours, our_stats = train(folder)
    moved = zip(theirs.pretrained_model.parameters(), load_policy(folder).parameters())
    assert max((a - b).abs().max() for a, b in moved) > 1e-3
    assert len({float(stats["objective/kl_coef"]) for stats in their_stats}) == 4
    for ours_at, theirs_at in zip(our_stats, their_stats):
        assert theirs_at["objective/kl"] != 0
        for key, value in theirs_at.items():
            if getattr(value, "size", 1) == 1 and "time" not in key:
                assert math.isclose(ours_at[key], value, rel_tol=1e-3, abs_tol=1e-5), key
    assert_same_weights(ours, theirs, rtol=1e-4, atol=1e-5)
