"""PPO and GRPO steps of TRL 1.12, the last with a PPO trainer, with and without us."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import assert_same_weights, folder, load_policy, make_tokenizer, prompts, reward_vowels
from transformers import LlamaForSequenceClassification
from trl import GRPOConfig, GRPOTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl.trainer import utils

from kl_kernels.integrations import trl

__all__ = ["folder"]
TIMES = ("time", "runtime", "per_second", "eps", "tokens_per")


def scorer(folder, seed):
    torch.manual_seed(seed)
    return LlamaForSequenceClassification.from_pretrained(folder, num_labels=1)


def ppo(folder, tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"input_ids": tokenizer(row["prompt"])["input_ids"]} for row in prompts(16)]
    config = PPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_mini_batches=1,
        gradient_accumulation_steps=1, total_episodes=12, num_ppo_epochs=2, response_length=8,
        learning_rate=0.1, lr_scheduler_type="constant", kl_coef=0.2, temperature=0.8, seed=0,
        report_to=[], logging_steps=1, save_strategy="no", num_sample_generations=0, bf16=False,
        use_cpu=True,
    )  # fmt: skip
    policy, value = load_policy(folder), scorer(folder, 4)
    parameters = [*policy.parameters(), *value.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        value_model=value,
        ref_model=type(policy).from_pretrained(folder),
        reward_model=scorer(folder, 5),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    return policy, [log for log in trainer.state.log_history if "objective/kl" in log]


def grpo(folder, tmp_path):
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=8, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd",
        logging_steps=1, save_strategy="no", report_to=[], seed=0, bf16=False, use_cpu=True,
        beta=0.1,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=load_policy(folder),
        reward_funcs=reward_vowels,
        args=config,
        train_dataset=Dataset.from_list(prompts()),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    return trainer.model, [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.exercises("PPO and GRPO steps, beta > 0: loss, metrics, weights")
@pytest.mark.parametrize(("run", "kl"), [(ppo, "objective/kl"), (grpo, "kl")])
def test_the_same_steps(run, kl, folder, tmp_path):
    theirs, their_logs = run(folder, tmp_path)
    with trl.patch():
        ours, our_logs = run(folder, tmp_path)
    assert len(their_logs) == 3
    assert all(abs(log[kl]) > 0.01 for log in their_logs)
    moved = zip(theirs.parameters(), load_policy(folder).parameters())
    assert max((a - b).abs().max() for a, b in moved) > 1e-3
    for ours_at, theirs_at in zip(our_logs, their_logs):
        for key, value in theirs_at.items():
            if not any(word in key for word in TIMES):
                assert math.isclose(ours_at[key], value, rel_tol=5e-4, abs_tol=5e-6), key
    assert_same_weights(ours, theirs, rtol=1e-4, atol=5e-6)


@pytest.mark.exercises("undo restores every module")
def test_undo():
    original = utils.selective_log_softmax
    with trl.patch():
        assert ppo_trainer.selective_log_softmax is utils.selective_log_softmax
        assert utils.selective_log_softmax is not original
    assert ppo_trainer.selective_log_softmax is utils.selective_log_softmax is original
