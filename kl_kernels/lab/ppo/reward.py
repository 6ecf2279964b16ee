"""The proxy reward: a model fitted to preferences, or any function of prompts and answers.

A reward function takes the texts of a batch and returns one score per answer, higher is better:

    def my_reward(prompts: list[str], answers: list[str]) -> list[float]: ...

Texts come without special tokens, and answers end before the first EOS; a chat comes as its
template writes it. Scores are a list, a tuple, a tensor or a NumPy array of finite numbers; True is
1 and False is 0. `--reward my_module:my_reward` finds the function on Python's path, which includes
the folder the command is run in. Scores should vary by about 1 over one batch, as kl_coef weighs
nats against them.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl_kernels.lab.ppo.policy import answer_texts, sample
from kl_kernels.lab.ppo.ranks import Ranks

Scores = Sequence[float] | np.ndarray | Tensor
RewardFunction = Callable[[list[str], list[str]], Scores]

ACCEPTED = "it must return a list, tensor or array with one finite number per answer"


def load_reward(spec: str) -> RewardFunction:
    """Import the function that "module:function" names.

    Raises:
        ValueError: it cannot be imported, or is not a function of prompts and answers.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and all(map(str.isidentifier, [*module_name.split("."), name]))):
        raise ValueError(f"reward is {spec!r}; it must read module:function")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function: Any = getattr(import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward is {spec!r}, which cannot be imported: {error}") from error
    if not callable(function):
        raise ValueError(f"reward is {spec!r}, a {type(function).__name__}, not a function")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise ValueError(
            f"reward is {spec!r}, which cannot be called as function(prompts, answers): {error}"
        ) from error
    except ValueError:  # some functions written in C have no signature
        pass
    return function


def score_answers(
    reward: RewardFunction, prompts: list[str], answers: list[str], ranks: Ranks
) -> Tensor:  # [b] float32
    """Score the local answers; an answer without a score is an error on all ranks."""
    return ranks.on_each(lambda: compute_scores(reward, prompts, answers))


def score_metrics(
    scores: Tensor,  # [b]
    answers: list[str],  # [b]
    gold: Callable[[str], float] | None,
    ranks: Ranks,
) -> dict[str, float | None]:
    """Summarise the scores of all ranks' answers."""
    scores = ranks.gather(scores)
    gold_mean = None
    if gold:
        local_golds = scores.new_tensor(list(map(gold, answers)), dtype=torch.float64)
        gold_mean = ranks.gather(local_golds).mean().item()
    return {"proxy": scores.mean().item(), "proxy_sd": scores.std().item(), "gold": gold_mean}


def compute_scores(
    reward: RewardFunction, prompts: list[str], answers: list[str]
) -> Tensor:  # [B] float32
    """Call the reward function, and check that it returned one finite number per answer.

    Raises:
        ValueError: the reward function did not return one finite number per answer.
        RuntimeError: it raised an error that the command line would take for one of its own.
    """
    try:
        returned: Any = reward(prompts, answers)
    except (ValueError, OSError) as error:
        raise RuntimeError(f"the reward function raised {type(error).__name__}: {error}") from error
    # Tensors, NumPy's arrays and pandas' columns have tolist.
    scores = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(scores, Sequence) or isinstance(scores, (str, bytes)):
        raise ValueError(f"the reward function returned {_describe(returned)}; {ACCEPTED}")
    if len(scores) != len(answers):
        raise ValueError(
            f"the reward function returned {len(scores)} scores for {len(answers)} answers; "
            f"{ACCEPTED}"
        )
    found = torch.tensor(list(map(_number, scores)), dtype=torch.float64).float()
    for i, score in enumerate(found.tolist()):
        if not math.isfinite(score):
            raise ValueError(
                f"the reward function returned {_describe(scores[i])} for answer {i} of "
                f"{len(answers)}, {answers[i][:80]!r}; {ACCEPTED}, within float32"
            )
    return found


def _number(score: Any) -> float:
    """Take Python's numbers, NumPy's, and tensors of one; anything else is NaN."""
    if hasattr(score, "item") and math.prod(score.shape) == 1:
        score = score.item()
    try:
        return float(score) if isinstance(score, Real) else math.nan
    except OverflowError:  # an int beyond all floats
        return math.inf


def _describe(x: Any) -> str:
    text = repr(x)
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(x).__name__}"


class TokenReward:
    """One weight per token, summed over the answer: blind to the order of the tokens.

    Repeating the best token is therefore the best answer, and a policy without a KL penalty finds
    that out. Scores have mean 0 and standard deviation 1 on the reference's answers.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.weights = nn.EmbeddingBag(len(tokenizer), 1, mode="sum")
        nn.init.zeros_(self.weights.weight)  # tokens never compared are worth nothing
        self.mean, self.sd = 0.0, 1.0

    def __call__(self, prompts: list[str], answers: list[str]) -> list[float]:
        with torch.no_grad():
            scores: list[float] = self.score(self.encode(answers)).tolist()
        return scores

    def encode(self, answers: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(answers, add_special_tokens=False).input_ids
        return ids

    def score(self, answers: list[list[int]]) -> Tensor:  # [N]
        ends = torch.tensor([0, *map(len, answers)]).cumsum(0)
        ids = torch.tensor([token for answer in answers for token in answer], dtype=torch.long)
        return (self.weights(ids, ends[:-1]).squeeze(-1) - self.mean) / self.sd

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights.weight.detach(), "mean": self.mean, "sd": self.sd}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights.weight.data.copy_(state["weights"])
        self.mean, self.sd = state["mean"], state["sd"]


@dataclass(frozen=True)
class RewardModelConstants:
    """Constants of `fit_reward_model`, as `PPOConfig` has them."""

    reward_pairs: int
    label_sharpness: float
    reward_epochs: int
    reward_lr: float
    reward_weight_decay: float
    batch_size: int
    answer_tokens: int


def fit_reward_model(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    gold: Callable[[str], float],
    constants: RewardModelConstants,
) -> TokenReward:
    """Fit a `TokenReward` to pairs of the reference's answers, labelled by the gold score.

    Preferences follow Bradley and Terry (1952): the first of a pair wins with probability
    sigmoid(label_sharpness x gold difference), so some labels are wrong, as people's are.
    """
    reward = TokenReward(tokenizer)
    answers = sample_answers(lm, tokenizer, prompts, constants)
    encoded = reward.encode(answers)
    gold_scores = torch.tensor([gold(answer) for answer in answers]).view(-1, 2)
    first_wins = torch.bernoulli(torch.sigmoid(constants.label_sharpness * -gold_scores.diff()))

    held_out = len(gold_scores) // 10
    optimizer = torch.optim.AdamW(
        reward.weights.parameters(), constants.reward_lr, weight_decay=constants.reward_weight_decay
    )
    for _ in range(constants.reward_epochs):
        for rows in (held_out + torch.randperm(len(gold_scores) - held_out)).split(64):
            pairs = [encoded[2 * row + side] for row in rows.tolist() for side in (0, 1)]
            margin = -reward.score(pairs).view(-1, 2).diff()  # first minus second
            loss = F.binary_cross_entropy_with_logits(margin, first_wins[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    with torch.no_grad():
        raw = reward.score(encoded)
        reward.mean, reward.sd = raw.mean().item(), raw.std().item() or 1.0
        margin = -raw.view(-1, 2).diff()
        right = ((margin > 0) == first_wins.bool())[:held_out].float().mean().item()
        correlation = torch.corrcoef(torch.stack((raw, gold_scores.flatten())))[0, 1].item()
    print(
        f"reward model: right on {right:.0%} of {held_out} held-out preferences, "
        f"correlation with gold {correlation:.2f}"
    )
    return reward


def sample_answers(
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    constants: RewardModelConstants,
) -> list[str]:
    """Sample two answers in a row for each of `reward_pairs` random prompts."""
    answers: list[str] = []
    progress = tqdm(total=2 * constants.reward_pairs, desc="preferences", unit="answer")
    while len(answers) < 2 * constants.reward_pairs:
        n = min(constants.batch_size, constants.reward_pairs - len(answers) // 2)
        chosen = torch.randint(len(prompts), (n,)).repeat_interleave(2).tolist()
        samples = sample(lm, tokenizer, [prompts[i] for i in chosen], constants.answer_tokens)
        answers += answer_texts(samples, tokenizer)
        progress.update(2 * n)
    progress.close()
    return answers
