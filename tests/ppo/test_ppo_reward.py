"""The fitted reward is blind to order; a given one is loaded and checked."""

import random
import sys

import pytest
import torch

from kl_kernels.ppo.config import PPOConfig
from kl_kernels.ppo.policy import answer_texts, sample
from kl_kernels.ppo.reward import TokenReward, fit_reward_model, load_reward, scores_of


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
    """Counting a token is within reach of one weight per token, so new answers rank as by gold."""
    lm, tokenizer = tiny
    config = PPOConfig(reward_pairs=400, answer_tokens=12, label_sharpness=10.0)
    prompts = [[5, 6, 7], [8, 9]]
    torch.manual_seed(0)
    samples = sample(lm, tokenizer, prompts * 100, 12)
    commonest = tokenizer.decode([int(samples.answers.flatten().mode().values)])

    def gold(answer):
        return answer.count(commonest)

    reward = fit_reward_model(config, lm, tokenizer, prompts, gold)
    answers = answer_texts(samples, tokenizer)
    scores = torch.tensor([reward([], answers), [gold(answer) for answer in answers]])
    assert torch.corrcoef(scores)[0, 1] > 0.9


def test_fitted_reward_is_standardised_and_survives_saving(tiny):
    lm, tokenizer = tiny
    config = PPOConfig(reward_pairs=64, answer_tokens=6, reward_epochs=1)
    torch.manual_seed(0)
    reward = fit_reward_model(config, lm, tokenizer, [[5, 6, 7]], len)
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
    assert scores_of(reward, ["p", "p"], ["abc", ""]).tolist() == [3.0, 0.0]


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
    ("scores", "message"),
    [([1.0], "1 scores for 2 answers"), ([1.0, float("nan")], "nan"), ([1.0, 1e400], "inf")],
)
def test_bad_scores_are_one_sentence(scores, message):
    with pytest.raises(ValueError, match=message):
        scores_of(lambda prompts, answers: scores, ["p", "q"], ["a", "b"])
