"""The fitted reward is blind to order; a given one is loaded and checked."""

import math
import random
import re
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.policy import answer_texts, sample
from kl_kernels.lab.ppo.reward import (
    RewardModelConstants,
    TokenReward,
    compute_scores,
    fit_reward_model,
    load_reward,
)


@pytest.fixture(scope="module")
def words():
    return [" class", " object", " value", " the", " a", " is", " method"]


def test_reward_is_blind_to_the_order_of_tokens(tiny, words):
    reward = TokenReward(tiny[1])
    torch.nn.init.normal_(reward.weights.weight, generator=torch.Generator().manual_seed(0))
    shuffled = random.Random(0).sample(words, len(words))
    assert shuffled != words
    straight, mixed, doubled = reward([], ["".join(words), "".join(shuffled), "".join(words * 2)])
    assert mixed == pytest.approx(straight, abs=1e-5)
    assert doubled == pytest.approx(2 * straight, abs=1e-5)
    assert reward([], ["", " class"])[0] == 0


def test_fitted_reward_learns_what_gold_counts(tiny):
    """One weight per token can count a token, so new answers rank as by gold."""
    lm, tokenizer = tiny
    constants = PPOConfig(reward_pairs=400, answer_tokens=12, label_sharpness=10.0).subset(
        RewardModelConstants
    )
    prompts = [[5, 6, 7], [8, 9]]
    torch.manual_seed(0)
    samples = sample(lm, tokenizer, prompts * 100, 12)
    commonest = tokenizer.decode([int(samples.answers.flatten().mode().values)])

    def gold(answer):
        return answer.count(commonest)

    reward = fit_reward_model(lm, tokenizer, prompts, gold, constants)
    answers = answer_texts(samples, tokenizer)
    scores = torch.tensor([reward([], answers), [gold(answer) for answer in answers]])
    assert torch.corrcoef(scores)[0, 1] > 0.9


def test_fitted_reward_is_standardised_and_survives_saving(tiny):
    lm, tokenizer = tiny
    constants = PPOConfig(reward_pairs=64, answer_tokens=6, reward_epochs=1).subset(
        RewardModelConstants
    )
    torch.manual_seed(0)
    reward = fit_reward_model(lm, tokenizer, [[5, 6, 7]], len, constants)
    again = TokenReward(tokenizer)
    again.load_state_dict(reward.state_dict())
    answers = [" class", " object value", ""]
    assert again([], answers) == reward([], answers)
    assert reward.sd > 0


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def length(prompts, answers):\n    return [len(a) for a in answers]\nCONSTANT = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_rewards"
    sys.modules.pop("my_rewards", None)


def test_a_reward_function_is_found_by_name(module):
    reward = load_reward("my_rewards:length")
    assert compute_scores(reward, ["p", "p"], ["abc", ""]).tolist() == [3.0, 0.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_rewards", "module:function"),
        (":length", "module:function"),
        ("nowhere_at_all:length", "cannot be imported"),
        ("my_rewards:missing", "cannot be imported"),
        ("my_rewards:CONSTANT", "not a function"),
    ],
)
def test_a_bad_reward_is_one_sentence(module, spec, message):
    with pytest.raises(ValueError, match=message) as error:
        load_reward(spec)
    assert spec in str(error.value)


@pytest.mark.parametrize(
    "scores",
    [
        [1, 0],
        (1.0, 0.0),
        [True, False],
        [Fraction(1), np.float32(0)],
        [np.int64(1), np.bool_(False)],
        [torch.tensor(1.0), torch.tensor([0])],
        np.array([1.0, 0.0], np.float16),
        np.array([1, 0]),
        np.array([True, False]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16, requires_grad=True),
        torch.tensor([True, False]),
    ],
    ids=repr,
)
def test_scores_are_numbers_of_any_kind(scores):
    found = compute_scores(lambda prompts, answers: scores, ["p", "q"], ["a", "b"])
    assert found.tolist() == [1.0, 0.0]
    assert found.dtype == torch.float32


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ([1.0], "returned 1 scores for 2 answers"),
        ([1.0, 2.0, 3.0], "returned 3 scores for 2 answers"),
        (np.zeros(3), "returned 3 scores for 2 answers"),
        ([1.0, float("nan")], "returned nan of type float for answer 1 of 2, 'b\\x1b'; it must"),
        ([1.0, 1e400], "returned inf of type float for answer 1"),
        ([1e39, 1], "returned 1e+39 of type float for answer 0"),
        ([10**400, 1], "of type int for answer 0 of 2, 'a'"),
        (torch.tensor([1.0, math.nan]), "returned nan of type float for answer 1"),
        ([None, 1], "returned None of type NoneType for answer 0 of 2, 'a'"),
        ([1, "2"], "returned '2' of type str for answer 1"),
        ([1, 2j], "returned 2j of type complex for answer 1"),
        (np.zeros((2, 1)), "returned [0.0] of type list for answer 0"),
        ([np.zeros(2), 1], "of type ndarray for answer 0"),
        (None, "returned None of type NoneType; it must return a list"),
        ("12", "returned '12' of type str; it must return a list"),
        ({0: 1, 1: 2}, "of type dict; it must return a list"),
        ({1, 2}, "of type set; it must return a list"),
        (torch.tensor(1.0), "returned tensor(1.) of type Tensor; it must return a list"),
        (3, "returned 3 of type int; it must return a list"),
    ],
    ids=repr,
)
def test_bad_scores_are_one_sentence_that_names_the_answer(scores, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        compute_scores(lambda prompts, answers: scores, ["p", "q"], ["a", "b\x1b"])
    assert "one finite number per answer" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_error_in_a_reward_function_keeps_its_traceback():
    """A ValueError that passed through would be printed as if an argument were wrong."""

    def reward(prompts, answers):
        return [float(answer) for answer in answers]

    with pytest.raises(RuntimeError, match="raised ValueError: could not convert") as error:
        compute_scores(reward, ["p"], ["a"])
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize(
    "definition", ["def f(answers): ...", "def f(prompts, answers, labels): ...", "class f: ..."]
)
def test_a_function_of_other_arguments_is_refused_at_once(tmp_path, monkeypatch, definition):
    (tmp_path / "other_arguments.py").write_text(definition + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be called as function\(prompts, answers\)"):
        load_reward("other_arguments:f")
    sys.modules.pop("other_arguments")
