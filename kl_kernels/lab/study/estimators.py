"""Bias and variance of estimators of the KL, on answers of a trained policy.

Estimates are per answer, as controllers and rewards use them: sums over its tokens. Tokens are
sampled from the policy, so k1, k3 and the exact KL per token all have the KL of the answer as their
expectation; k2 has not. They differ in how far single answers scatter around it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from kl_kernels import kl_penalty, token_kl
from kl_kernels.lab.ppo.checkpoint import load_state, save_state
from kl_kernels.lab.ppo.command import Task
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.policy import causal_lm, sample
from kl_kernels.lab.study.plan import Plan, StudyFolder
from kl_kernels.lab.study.statistics import Array, mean_interval, variance_ratio

SAMPLED: tuple[Literal["k1", "k2", "k3"], ...] = ("k1", "k2", "k3")


def measure_all(
    plan: Plan, study: StudyFolder, task: Task, config: PPOConfig
) -> dict[str, dict[str, Any]]:
    """`compare` for the policy of each beta, of the first seed; samples are kept in the folder."""
    found = {}
    reference = task.lm.eval()
    for beta in plan.betas:
        path = study.estimates(beta, config.seed)
        if not path.is_file():
            policy, _ = load_model(study.run(beta, config.seed).policy)
            policy = policy.to(reference.device).eval()
            sums = sample_sums(plan.n_sequences, policy, reference, task, config, beta)
            save_state(path, sums)
        sums = load_state(path)
        found[beta] = compare({name: tensor.numpy() for name, tensor in sums.items()})
    return found


@torch.no_grad()
def sample_sums(
    n: int,
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    task: Task,
    config: PPOConfig,
    name: str,
) -> dict[str, Tensor]:  # each [n]
    """Sample `n` answers of the policy; `sequence_sums` of each."""
    torch.manual_seed(config.seed)
    pieces: list[dict[str, Tensor]] = []
    progress = tqdm(total=n, desc=f"estimators, beta {name}", unit="answer")
    while progress.n < n:
        rows = torch.randint(len(task.prompts), (min(config.batch_size, n - progress.n),))
        prompts = [task.prompts[i] for i in rows.tolist()]
        samples = sample(policy, task.tokenizer, prompts, config.answer_tokens)
        logits, ref_logits = (
            causal_lm(lm, samples.ids, samples.attention_mask, samples.mask.shape[1])[0]
            for lm in (policy, reference)
        )
        pieces.append(sequence_sums(logits, ref_logits, samples.answers, samples.mask))
        progress.update(len(prompts))
    progress.close()
    return {key: torch.cat([piece[key] for piece in pieces]).cpu() for key in pieces[0]}


def sequence_sums(
    logits: Tensor,  # [B, T, V]
    ref_logits: Tensor,  # [B, T, V]
    token_ids: Tensor,  # [B, T], sampled from the policy
    mask: Tensor,  # [B, T] bool
) -> dict[str, Tensor]:  # each [B] float64
    """Every estimator of the KL in nats, summed over each answer's tokens."""
    out = token_kl(logits, ref_logits, token_ids, mask=mask)
    per_token = {"exact": out.kl}
    for name in SAMPLED:
        per_token[name] = kl_penalty(
            out.logprob, out.ref_logprob, name, gradient="detach", mask=mask
        )
    return {name: kl.double().sum(1) for name, kl in per_token.items()}


def compare(sums: dict[str, Array]) -> dict[str, Any]:  # each [N], of the same answers
    """Bias and variance of each estimator beside the exact KL per token.

    The bias is the mean difference from exact, answer by answer: both have the same expectation
    if the estimator has no bias, and most of what scatters cancels.
    """
    exact = sums["exact"]
    found: dict[str, Any] = {
        "n": len(exact),
        "kl": dataclasses.asdict(mean_interval(exact)),
        "sd_exact": float(np.std(exact, ddof=1)),
        "estimators": {},
    }
    for name in SAMPLED:
        bias, ratio = mean_interval(sums[name] - exact), variance_ratio(sums[name], exact)
        found["estimators"][name] = {
            "bias": dataclasses.asdict(bias),
            "sd": float(np.std(sums[name], ddof=1)),
            "variance_ratio": dataclasses.asdict(ratio),
        }
    return found
