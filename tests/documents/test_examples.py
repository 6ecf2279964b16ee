"""The examples do what they say: rewards rise, penalties bind, distances fall."""

import importlib
import math

import pytest
import torch


@pytest.fixture
def example(monkeypatch, pytestconfig):
    """Imports one; on one thread, as models this small only wait for a second one."""
    monkeypatch.syspath_prepend(pytestconfig.rootpath / "examples")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield importlib.import_module
    torch.set_num_threads(threads)


def mean(values):
    return sum(values) / len(values)


def test_grpo_raises_the_reward_and_its_penalty_bounds_the_kl(example, capsys):
    train = example("grpo").train
    rewards, kls = zip(*train(kl_coef=0.2))
    assert len(capsys.readouterr().out.splitlines()) == len(rewards)
    assert kls[0] == 0
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.2
    _, free = zip(*train(kl_coef=0.0))
    assert 0 < kls[-1] < 0.8 * free[-1] < math.log(2)  # all that even tokens alone would cost


def test_ppo_raises_the_reward_and_its_controller_holds_the_kl(example, capsys):
    rewards, kls = zip(*example("ppo_step").train())
    printed = capsys.readouterr().out
    assert kls[0] == 0
    assert mean(rewards[-5:]) > mean(rewards[:5]) + 0.15
    assert 2 / 1.5 < mean(kls[-5:]) < 2 * 1.5  # its target is 2 nats
    assert len(printed.splitlines()) == len(rewards)
    assert "start_kl" not in printed


def test_distillation_brings_the_student_to_its_teacher(example):
    distillation = example("distillation")
    kls = distillation.train()
    assert kls[-1] < 0.6 * kls[0]
    without_logits = distillation.train(5, distillation.kl_without_logits)
    assert without_logits == pytest.approx(kls[:5], rel=1e-4)
    from_top_k = distillation.train(60, distillation.kl_from_top_k)
    assert 0.3 * kls[0] < from_top_k[0] < kls[0]  # it knows less
    assert from_top_k[-1] < 0.6 * from_top_k[0]


def test_hard_cases_are_right_here_and_wrong_in_the_usual_formula(example):
    for case in example("hard_cases").CASES:
        usual, here, true = map(float, case())
        assert here == pytest.approx(true, rel=1e-3), case.__name__
        assert usual != pytest.approx(true, rel=0.1), case.__name__
