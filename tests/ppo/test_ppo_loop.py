"""The loop notices a policy that is not what it samples from, and loses nothing when stopped."""

import dataclasses
import math

import pytest
import torch
from micro import MICRO, parse

from kl_kernels.ppo import loop, pretrain
from kl_kernels.ppo.checkpoint import RunFolder, create_run, load_state
from kl_kernels.ppo.config import PPOConfig
from kl_kernels.ppo.policy import Policy, load_model
from kl_kernels.ppo.report import read_metrics

CONFIG = PPOConfig(**{k: v for k, v in vars(parse(*MICRO)).items() if k not in ("out", "resume")})
PROMPTS = [[4], [7, 8, 9], [11, 12]]


def vowels(prompts, answers):
    return [sum(letter in "aeiou" for letter in answer) / 4 for answer in answers]


def train(folder, model_folder, *, reward=vowels, **changes):
    """The metrics of a new run, or of one that goes on in `folder`; all but the time it took."""
    config = dataclasses.replace(CONFIG, **changes)
    run = RunFolder(folder) if folder.exists() else create_run(folder, config)
    lm, tokenizer = load_model(model_folder)
    loop.train(config, run, lm, tokenizer, PROMPTS, reward, None)
    records = read_metrics(run.metrics)
    assert all(record.pop("seconds") > 0 for record in records)
    return records


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exact_kl_gradient": "advantage"},
        {"kl_estimator": "k1"},
        {"controller": "fixed", "kl_coef": 0.0},
    ],
)
def test_every_form_of_the_kl_starts_at_ratio_one_and_kl_zero(tmp_path, model_folder, changes):
    first, second = train(tmp_path / "run", model_folder, updates=2, **changes)
    assert first["kl"] < 1e-6
    assert second["kl"] > 1e-4, "nothing was learned"
    assert math.isfinite(second["policy_loss"])


def test_rewards_and_beta_in_another_unit_teach_the_same(tmp_path, model_folder):
    """Whitening divides rewards by their spread, so the KL in the loss has to be divided as well.

    Two updates: after the first, the value head's steps no longer scale with the rewards.
    """
    common = {"updates": 2, "controller": "fixed", "max_grad_norm": 1e9}
    kls = [
        train(
            tmp_path / str(unit),
            model_folder,
            reward=lambda *texts, unit=unit: [unit * v for v in vowels(*texts)],
            kl_coef=0.3 * unit,
            **common,
        )[1]["kl"]
        for unit in (1, 128)
    ]
    assert kls[0] == pytest.approx(kls[1], rel=1e-4)


def test_one_token_answers_feel_corrected_exact_kl_as_they_feel_k1(tmp_path, model_folder):
    """With no earlier token to credit, exact KL and its correction add up to k1.

    Three updates: the KL is 0 in the first, and the value heads differ after the second.
    """
    common = {"updates": 3, "answer_tokens": 1, "controller": "fixed", "kl_coef": 5.0}
    common |= {"max_grad_norm": 1e9, "learning_rate": 1e-2}
    common |= {"reward": lambda prompts, answers: [sum(map(ord, a)) % 5 for a in answers]}
    exact = train(tmp_path / "exact", model_folder, exact_kl_gradient="advantage", **common)
    k1 = train(tmp_path / "k1", model_folder, kl_estimator="k1", **common)
    assert exact[2]["kl"] == pytest.approx(k1[2]["kl"], rel=1e-4)
    assert k1[1]["kl"] > 1e-3, "there is hardly a KL to be felt"


def test_dropout_is_noticed(tmp_path, model_folder, monkeypatch):
    class Dropping(Policy):
        def __init__(self, lm):
            super().__init__(lm)
            self.train()

    monkeypatch.setattr(loop, "Policy", Dropping)
    with pytest.raises(RuntimeError, match="before the first step a policy ratio is off 1"):
        train(tmp_path / "run", model_folder)


def test_another_reference_is_noticed(tmp_path, model_folder, monkeypatch):
    copy = loop.frozen_copy

    def other(lm):
        reference = copy(lm)
        reference.get_input_embeddings().weight.mul_(1.1)
        return reference

    monkeypatch.setattr(loop, "frozen_copy", other)
    with pytest.raises(RuntimeError, match="before the first step a token's KL"):
        train(tmp_path / "run", model_folder)


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, 0.01])
def test_the_start_check_refuses(nonsense):
    loop.check_start(0.0, 0.0)
    with pytest.raises(RuntimeError):
        loop.check_start(nonsense, 0.0)
    with pytest.raises(RuntimeError):
        loop.check_start(0.0, nonsense)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, model_folder):
    """Stopped in the middle of update 4, after metrics that its last checkpoint does not cover."""
    options = {"updates": 5, "checkpoint_every": 2}
    whole = train(tmp_path / "whole", model_folder, **options)

    calls = []

    def interrupted(prompts, answers):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return vowels(prompts, answers)

    stopped = RunFolder(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped.path, model_folder, reward=interrupted, **options)
    assert load_state(stopped.checkpoint)["updates"] == 2
    assert len(read_metrics(stopped.metrics)) == 3

    torch.manual_seed(999)  # another process has other random numbers
    assert train(stopped.path, model_folder, **options) == whole
    states = [load_state(tmp_path / name / "checkpoint.pt") for name in ("whole", "stopped")]
    for part in ("policy", "optimizer", "controller", "rng", "updates"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_pretraining_goes_on_bit_for_bit(tmp_path, paragraphs, monkeypatch):
    config = PPOConfig(vocab_size=300, hidden_size=8, layers=1, pretrain_steps=6, pretrain_batch=2)
    monkeypatch.setattr(pretrain, "STEPS_PER_CHECKPOINT", 2)
    whole, stopped = (create_run(tmp_path / name, config) for name in ("whole", "stopped"))
    pretrain.pretrain(config, paragraphs, whole)

    windows, calls = pretrain.random_windows, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return windows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "random_windows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(config, paragraphs, stopped)
    assert load_state(stopped.pretraining)["step"] == 2
    pretrain.pretrain(config, paragraphs, stopped)

    weights = [load_model(run.reference)[0].state_dict() for run in (whole, stopped)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not stopped.pretraining.exists()


def test_a_large_beta_holds_the_policy_and_a_small_one_does_not(tmp_path, model_folder):
    def kl(name, kl_coef):
        options = {"updates": 12, "controller": "fixed", "kl_coef": kl_coef, "learning_rate": 3e-3}
        return train(tmp_path / name, model_folder, **options)[-1]["kl"]

    assert kl("held", 50.0) < kl("free", 0.0) / 5
