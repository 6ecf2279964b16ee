"""The loop notices a policy that differs from its samples' policy, and resumes bit for bit."""

import copy
import dataclasses
import math

import pytest
import torch
from micro import CONFIG, train, vowels

from kl_kernels import KLRewards, compute_gae
from kl_kernels.lab.ppo import loop, policy, pretrain, ref_model
from kl_kernels.lab.ppo.checkpoint import RunFolder, create_run, load_state
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.losses import check_initial_kl, check_initial_ratio
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.policy import Policy, Samples
from kl_kernels.lab.ppo.ranks import SINGLE_PROCESS
from kl_kernels.lab.ppo.report import read_metrics
from kl_kernels.lab.ppo.rollout import (
    AdvantageConstants,
    ScoreConstants,
    compute_advantages,
    shape_scores,
)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"exact_kl_gradient": "advantage"},
        {"kl_estimator": "k1"},
        {"controller": "fixed", "kl_coef": 0.0},
        {"kl_in": "loss"},
        {"kl_in": "loss", "kl_estimator": "k2"},
        {"reference": "adapter", "lora_rank": 4},
        {"controller": "threshold"},
        {"controller": "pi", "whiten_rewards": True},
    ],
)
def test_every_form_of_the_kl_starts_at_ratio_one_and_kl_zero(tmp_path, model_folder, changes):
    first, second = train(tmp_path / "run", model_folder, updates=2, **changes)
    assert first["kl"] < 1e-6
    assert second["kl"] > 1e-4, "nothing was learned"
    assert math.isfinite(second["policy_loss"])


@pytest.mark.parametrize("changes", [{}, {"kl_in": "loss"}])
def test_rewards_and_beta_in_another_unit_train_the_same(tmp_path, model_folder, changes):
    """Whitening divides rewards by their spread, so the KL in the loss must be divided as well.

    Two updates: after the first, the value head's steps no longer scale with the rewards.
    """
    common = {"updates": 2, "controller": "fixed", "max_grad_norm": 1e9} | changes
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


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_whitening_s_units_are_multiplied(whiten_rewards):
    """The cost of a nat in whitened advantages follows from standard deviations, one by one."""
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    rewards, values = torch.randn(2, 3, 4) * 5
    rollout = KLRewards(rewards, *torch.zeros(5, 3, 4))
    samples = Samples(torch.zeros(3, 4), mask, mask)
    config = dataclasses.replace(CONFIG, whiten_rewards=whiten_rewards)
    constants = config.subset(AdvantageConstants)
    batch, units_per_score = compute_advantages(samples, rollout, values, SINGLE_PROCESS, constants)

    reward_sd = rewards[mask].std() if whiten_rewards else 1.0
    mean = rewards[mask].mean()
    shaped = (rewards - mean) / reward_sd + mean if whiten_rewards else rewards
    advantages = compute_gae(shaped, values, mask, gamma=config.gamma, lam=config.lam)[0]
    advantage_sd = advantages[mask].std()
    assert units_per_score == pytest.approx(1 / (reward_sd * advantage_sd).item(), rel=1e-5)
    whitened = (advantages - advantages[mask].mean()) / advantage_sd
    torch.testing.assert_close(batch.advantages[mask], whitened[mask], rtol=1e-5, atol=1e-5)


def test_one_token_answers_feel_corrected_exact_kl_as_they_feel_k1(tmp_path, model_folder):
    """Exact KL and its correction add up to k1 where there is no earlier token to credit.

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
        def forward(self, *arguments):
            self.train(torch.is_grad_enabled())  # in the loss, not in the rollout
            return super().forward(*arguments)

    monkeypatch.setattr(loop, "Policy", Dropping)
    with pytest.raises(RuntimeError, match="before the first step a policy ratio is off 1"):
        train(tmp_path / "run", model_folder)


def test_another_reference_is_noticed(tmp_path, model_folder, monkeypatch):
    make = loop.make_ref_model

    def other(lm, device, lora_rank):
        changed = copy.deepcopy(lm)
        changed.get_input_embeddings().weight.data.mul_(1.1)
        return lm, make(changed, device, lora_rank)[1]

    monkeypatch.setattr(loop, "make_ref_model", other)
    with pytest.raises(RuntimeError, match="before the first step a token's KL"):
        train(tmp_path / "run", model_folder)


@pytest.mark.parametrize("shift", [0, 1])
def test_logits_one_position_late_are_told(tmp_path, model_folder, monkeypatch, shift):
    """Rollout, loss and reference agree on the wrong rows, so that every ratio is 1 and KL 0."""
    right = policy.causal_lm

    def late(lm, ids, attention_mask, n_answer):
        longer = (torch.cat([x, x[:, :shift]], 1) for x in (ids, attention_mask))
        return right(lm, *longer, n_answer)

    monkeypatch.setattr(policy, "causal_lm", late)
    monkeypatch.setattr(ref_model, "causal_lm", late)
    records = train(tmp_path / "run", model_folder, updates=3, batch_size=32)
    told = [record["update"] for record in records if "sampling_gap" in record["events"]]
    assert told == ([1] if shift else [])


@pytest.mark.parametrize("nonsense", [math.nan, math.inf, 0.01])
def test_the_start_check_refuses(nonsense):
    check_initial_ratio(0.0, 1.0)
    check_initial_kl(0.0)
    with pytest.raises(RuntimeError):
        check_initial_ratio(nonsense, 1.0)
    with pytest.raises(RuntimeError):
        check_initial_ratio(0.0, 1 + nonsense)
    with pytest.raises(RuntimeError):
        check_initial_kl(nonsense)


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, model_folder):
    """The run stops in the middle of update 4, after metrics that no checkpoint covers."""
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
    for part in ("monitor", "controller"):
        assert states[0][part] == states[1][part]
    for part in ("policy", "optimizer", "rng", "updates"):
        torch.testing.assert_close(states[0][part], states[1][part], rtol=0, atol=0)


def test_a_reference_that_is_the_policy_without_its_adapter(tmp_path, model_folder):
    """The adapter alone learns, and the KL is to the model it was put on."""
    start = load_model(model_folder)[0].state_dict()
    train(tmp_path / "run", model_folder, updates=3, reference="adapter", learning_rate=1e-2)
    saved = load_state(tmp_path / "run" / "checkpoint.pt")
    trained = {n for n, w in saved["policy"].items() if "lora" in n and "_B." in n and w.any()}
    assert trained, "nothing was learned"
    base = {
        name.replace("lm.base_model.model.", "").replace("base_layer.", ""): weight
        for name, weight in saved["policy"].items()
        if "lora" not in name
    }
    for name, weight in start.items():
        assert torch.equal(base[name], weight), name
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[2]["kl"] > 1e-3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [1.0, 4.0, -6.0]),
        ({"score_clip": 2.0}, [1.0, 2.0, -2.0]),
        ({"length_exponent": 1.0}, [1.0, 2.0, -2.0]),
        ({"missing_eos_penalty": 5.0}, [-4.0, 4.0, -11.0]),
        ({"missing_eos_penalty": 5.0, "missing_eos": "replace"}, [-5.0, 4.0, -5.0]),
        ({"overlong_buffer": 2}, [1.0, 4.0, -6.5]),
        ({"overlong_buffer": 2, "overlong_factor": 3.0}, [1.0, 4.0, -7.5]),
        ({"score_clip": 2.0, "missing_eos_penalty": 5.0}, [-4.0, 2.0, -7.0]),
    ],
)
def test_scores_are_shaped_by_length_and_ending(changes, expected):
    """Answers of 1, 2 and 3 tokens; only the second holds EOS, and the first EOS as padding."""
    eos = 9
    ids = torch.tensor([[1, eos, eos, eos], [1, eos, eos, eos], [1, 2, 3, 0]])
    mask = torch.arange(4) < torch.tensor([[1], [2], [3]])
    samples = Samples(ids, mask, mask)
    config = dataclasses.replace(CONFIG, answer_tokens=4, **changes)
    constants = config.subset(ScoreConstants)
    shaped = shape_scores(torch.tensor([1.0, 4.0, -6.0]), samples, eos, constants)
    assert shaped.tolist() == pytest.approx(expected)


def test_pretraining_goes_on_bit_for_bit(tmp_path, paragraphs, monkeypatch):
    config = PPOConfig(vocab_size=300, hidden_size=8, layers=1, pretrain_steps=6, pretrain_batch=2)
    monkeypatch.setattr(pretrain, "STEPS_PER_CHECKPOINT", 2)
    whole, stopped = (create_run(tmp_path / name, config) for name in ("whole", "stopped"))
    constants = config.subset(pretrain.PretrainConstants)
    pretrain.pretrain(constants, paragraphs, whole)

    windows, calls = pretrain.random_windows, []

    def interrupted(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return windows(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "random_windows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain.pretrain(constants, paragraphs, stopped)
    assert load_state(stopped.pretraining)["step"] == 2
    pretrain.pretrain(constants, paragraphs, stopped)

    weights = [load_model(run.reference)[0].state_dict() for run in (whole, stopped)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not stopped.pretraining.exists()


def test_a_large_beta_holds_the_policy_and_a_small_one_does_not(tmp_path, model_folder):
    def kl(name, kl_coef):
        options = {"updates": 12, "controller": "fixed", "kl_coef": kl_coef, "learning_rate": 3e-3}
        return train(tmp_path / name, model_folder, **options)[-1]["kl"]

    assert kl("held", 50.0) < kl("free", 0.0) / 5
