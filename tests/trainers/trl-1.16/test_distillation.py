"""Distillation steps with and without the fused functions: the same training."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import assert_same_weights, folder, load_policy, make_model, make_tokenizer, prompts
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from kl_kernels.integrations import trl, trl_heads
from kl_kernels.integrations import trl as integration

__all__ = ["folder"]
COMMON = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "seed": 0,
    "bf16": False,
    "use_cpu": True,
}
CHAT = (
    "{% for message in messages %}{{ message['content'] }}{% if message['role'] == 'assistant' %}"
    "{{ eos_token }}{% endif %}{% endfor %}"
)


def distil(folder, tmp_path, beta):
    config = DistillationConfig(
        output_dir=str(tmp_path), beta=beta, max_completion_length=10, **COMMON
    )
    trainer = DistillationTrainer(
        model=load_policy(folder),
        teacher_model=make_model(5, hidden_size=48),
        args=config,
        train_dataset=Dataset.from_list(prompts()),
        processing_class=make_tokenizer(),
    )
    return trained(trainer)


def gkd(folder, tmp_path, beta):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    config = GKDConfig(
        output_dir=str(tmp_path), beta=beta, lmbda=0.5, max_new_tokens=8, max_length=64, **COMMON
    )
    rows = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": "an answer"},
            ]
        }
        for row in prompts()
    ]
    trainer = GKDTrainer(
        model=load_policy(folder),
        teacher_model=make_model(5),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    return trained(trainer)


def trained(trainer):
    torch.manual_seed(0)
    trainer.train()
    return trainer.model, [log for log in trainer.state.log_history if "loss" in log]


@pytest.mark.exercises("DistillationTrainer and GKDTrainer steps: loss, metrics, weights")
@pytest.mark.parametrize("run", [distil, gkd])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_the_same_steps(run, beta, folder, tmp_path, monkeypatch):
    calls = []
    for module, name in ((trl_heads, "linear_jsd_and_entropy"), (integration, "token_jsd")):
        monkeypatch.setattr(module, name, counting(getattr(module, name), calls))
    theirs, their_logs = run(folder, tmp_path, beta)
    assert not calls
    with trl.patch():
        ours, our_logs = run(folder, tmp_path, beta)
    assert calls
    assert all(min(log["loss"], log["grad_norm"]) > 1e-3 for log in their_logs)
    for ours_at, theirs_at in zip(our_logs, their_logs):
        for key in ("loss", "grad_norm", "entropy"):
            if key in theirs_at:
                assert math.isclose(ours_at[key], theirs_at[key], rel_tol=2e-4, abs_tol=2e-6), key
    assert_same_weights(ours, theirs, rtol=1e-4, atol=2e-6)


def counting(function, calls):
    def counted(*args, **kwargs):
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return counted
