"""The same prompts, answered by the reference and by trained policies, with both scores."""

from __future__ import annotations

from typing import Any

import torch

from kl_kernels.lab.ppo.command import Task
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.policy import answer_texts, sample
from kl_kernels.lab.ppo.reward import compute_scores
from kl_kernels.lab.study.plan import StudyFolder, described

N_PROMPTS = 5


def answers_side_by_side(
    study: StudyFolder, task: Task, config: PPOConfig, betas: list[str]
) -> list[dict[str, Any]]:
    """Sample an answer of each model to prompts from all over the corpus: text, proxy and gold.

    Sampled, with the same random numbers for all; the likeliest answers of so small a language
    model repeat themselves whatever it was trained for.
    """
    step = max(1, len(task.prompts) // N_PROMPTS)
    prompts = task.prompts[step // 2 :: step][:N_PROMPTS]
    texts = [task.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
    found: list[dict[str, Any]] = [{"prompt": text, "answers": {}} for text in texts]
    for beta in [None, *betas]:
        if beta is None:
            lm, name = task.lm, "reference"
        else:
            lm, name = load_model(study.run(beta, config.seed).policy)[0], described(beta)
        torch.manual_seed(config.seed)
        samples = sample(
            lm.to(task.lm.device).eval(), task.tokenizer, prompts, config.answer_tokens
        )
        answers = answer_texts(samples, task.tokenizer)
        proxies = compute_scores(task.reward, texts, answers).tolist()
        for row, answer, proxy in zip(found, answers, proxies):
            gold = task.gold(answer) if task.gold else None
            row["answers"][name] = {"text": answer, "proxy": proxy, "gold": gold}
    return found
