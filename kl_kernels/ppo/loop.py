"""Proximal policy optimisation of a language model, from rollout to checkpoint, top to bottom.

    maximise  E[reward(prompt, answer)] - beta KL(policy || reference)

Each update samples answers, shapes their rewards, estimates advantages, and takes a few clipped
gradient steps (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019,
arXiv 1909.08593).

The KL per token is exact, a sum over the vocabulary instead of one sampled log-ratio. As a reward
exact KL credits earlier tokens but not the token just sampled, which it does not depend on; that
token's share is the gradient of the KL itself, added to the loss. Together they are the gradient of
the objective above. (With kl_estimator k1 the sampled log-ratio in the reward does both, noisily.)

On several processes (`ranks.py`) each samples, scores and shapes its own rows of the batch, and
takes its own rows of every minibatch; DDP averages their gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl_kernels import (
    AdaptiveKLController,
    FixedKLController,
    KLRewards,
    compute_gae,
    fused_policy_loss,
    kl_rewards,
    masked_mean,
    masked_var,
    masked_whiten,
    ppo_value_loss,
)
from kl_kernels.ppo.checkpoint import RunFolder, load_state, restore_rng, rng_state, save_state
from kl_kernels.ppo.config import PPOConfig
from kl_kernels.ppo.policy import Policy, Samples, answer_texts, causal_lm, frozen_copy, sample
from kl_kernels.ppo.ranks import Ranks, launch
from kl_kernels.ppo.report import MetricsLog, live_line
from kl_kernels.ppo.reward import RewardFunction, scores_of

# Rounding moves a log-probability by 1e-5 or so when the same row is computed in another batch;
# dropout, a wrong position or an unmasked pad move it by 0.1 and more.
RATIO_TOLERANCE = 1e-3
KL_TOLERANCE = 1e-4  # nats per token


@dataclass(frozen=True)
class Batch:
    """Everything the optimisation of one update needs, a row per answer, of all ranks."""

    samples: Samples
    logprobs: Tensor  # [B, T] under the policy that sampled them
    values: Tensor  # [B, T]
    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T]

    def each(self, f: Callable[[Tensor], Tensor]) -> Batch:
        rest = (self.logprobs, self.values, self.advantages, self.returns)
        return Batch(self.samples.each(f), *map(f, rest))

    def rows(self, rows: Tensor) -> Batch:  # [b] int64
        return self.each(lambda tensor: tensor[rows])


def train(
    config: PPOConfig,
    run: RunFolder,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    reward: RewardFunction,
    gold: Callable[[str], float] | None,
) -> PreTrainedModel:
    """Train `lm`, or go on where the checkpoint in `run` ends, and return it.

    Of several processes, each calls this with the same arguments; the first one writes.

    Raises:
        ValueError: the batch does not divide by the number of processes.
        RuntimeError: before the first step, the policy already differs from itself or from the
            reference.
    """
    accelerator, ranks = launch()
    ranks.check(config)

    torch.manual_seed(config.seed)
    reference = frozen_copy(lm).to(accelerator.device)
    module = Policy(lm)
    optimizer = torch.optim.Adam(
        [
            {"params": module.lm.parameters(), "lr": config.learning_rate},
            {"params": module.value_head.parameters(), "lr": config.value_lr},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    policy, optimizer = accelerator.prepare(module, optimizer)
    controller = (
        AdaptiveKLController(
            config.kl_coef, config.kl_target, config.kl_horizon, unit="sequence_sum"
        )
        if config.controller == "adaptive"
        else FixedKLController(config.kl_coef)
    )

    done = 0
    if run.checkpoint.is_file():
        state = load_state(run.checkpoint)
        module.load_state_dict(state["policy"])
        optimizer.load_state_dict(state["optimizer"])
        controller.load_state_dict(state["controller"])
        restore_rng(state["rng"])
        done = state["updates"]

    log = ranks.on_first(lambda: MetricsLog(run.metrics, keep=done))
    progress = tqdm(range(done + 1, config.updates + 1), desc="PPO", unit="update",
                    initial=done, total=config.updates, dynamic_ncols=True,
                    disable=not ranks.first)  # fmt: skip
    for update in progress:
        started = time.perf_counter()
        kl_coef = controller.value

        # 1. Rollout: sample answers, and ask what they are worth.
        chosen = [prompts[i] for i in torch.randint(len(prompts), (config.batch_size,)).tolist()]
        samples = sample(module.lm, tokenizer, chosen, config.answer_tokens, ranks)
        own = chosen[ranks.rows(len(chosen))]
        prompt_texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
        answers = answer_texts(samples, tokenizer)
        scores = scores_of(reward, prompt_texts, answers)

        # 2. Rewards: the score at the last token, -beta KL at every token.
        shaped, values = shape_rewards(config, policy, reference, samples, scores, kl_coef)

        # 3. Advantages: better or worse than the value head expected, token by token.
        mask = samples.mask
        advantages, returns = compute_gae(
            shaped.rewards, values, mask, gamma=config.gamma, lam=config.lam
        )
        if not config.kl_in_loss:
            advantages = advantages + shaped.advantage_correction
        # Whitened advantages measure rewards in standard deviations; so must the KL in the loss.
        advantage_var = masked_var(advantages, mask, group=ranks.group)
        advantage_sd = advantage_var.sqrt().clamp_min(1e-8).item()
        kl_loss_coef = kl_coef / advantage_sd if config.kl_in_loss else 0.0
        advantages = masked_whiten(advantages, mask, group=ranks.group)
        batch = Batch(samples, shaped.logprob, values, advantages, returns).each(ranks.all_rows)

        # 4. Optimisation: a few clipped steps, each on a random part of the batch.
        steps: list[dict[str, float]] = []
        for _ in range(config.epochs):
            for rows in torch.randperm(config.batch_size).chunk(config.minibatches):
                part = batch.rows(rows.to(accelerator.device))
                loss, metrics = ppo_loss(config, policy, reference, part, kl_loss_coef, ranks)
                if update == 1 and not steps:
                    largest_kl = ranks.largest(shaped.kl.max()).item()
                    check_start(metrics["ratio_deviation"], largest_kl)
                optimizer.zero_grad()
                accelerator.backward(loss)
                norm = accelerator.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                optimizer.step()
                steps.append({**metrics, "grad_norm": float(norm)})

        # 5. Control: beta follows the KL of the answers that were just sampled.
        controlled = controller.update(shaped.kl, config.batch_size, mask=mask, group=ranks.group)

        # 6. Report, then checkpoint: metrics after the checkpoint are dropped when resuming.
        scores = ranks.all_rows(scores.to(accelerator.device))
        entropy = masked_mean(shaped.entropy, mask, group=ranks.group)
        golds = scores.new_tensor(list(map(gold, answers)) if gold else [], dtype=torch.float64)
        record: dict[str, Any] = {
            "update": update,
            "proxy": scores.mean().item(),
            "proxy_sd": scores.std().item(),
            "gold": ranks.all_rows(golds).mean().item() if gold else None,
            "kl": controlled.kl,
            "kl_coef": kl_coef,
            "entropy": entropy.item(),
            "length": batch.samples.mask.sum(1).float().mean().item(),
            "advantage_sd": advantage_sd,
            **{name: fmean(step[name] for step in steps) for name in steps[0]},
            "seconds": time.perf_counter() - started,
            "sample": prompt_texts[0] + " |" + answers[0],
        }
        if not ranks.first:
            continue
        log.append(record)
        progress.set_postfix_str(live_line(record))
        if update % config.checkpoint_every == 0 or update == config.updates:
            save_state(
                run.checkpoint,
                {
                    "policy": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "controller": controller.state_dict(),
                    "rng": rng_state(),
                    "updates": update,
                },
            )
    return module.lm


@torch.no_grad()
def shape_rewards(
    config: PPOConfig,
    policy: Policy,
    reference: PreTrainedModel,
    samples: Samples,
    scores: Tensor,  # [B]
    kl_coef: float,
) -> tuple[KLRewards, Tensor]:
    """Rewards, KL and log-probabilities of the samples, and their values [B, T].

    Log-probabilities are recomputed instead of taken from `generate`, whose cached keys round
    differently. A minibatch at a time, so that memory is that of an optimisation step.
    """
    pieces, values = [], []
    n_answer = samples.mask.shape[1]
    for rows in torch.arange(len(scores)).chunk(config.minibatches):
        part = samples.rows(rows.to(samples.ids.device))
        logits, value = policy(part.ids, part.attention_mask, n_answer)
        ref_logits, _ = causal_lm(reference, part.ids, part.attention_mask, n_answer)
        pieces.append(
            kl_rewards(
                logits,
                ref_logits,
                part.answers,
                scores[rows].to(logits.device),
                part.mask,
                kl_coef=kl_coef,
                kl_estimator=config.kl_estimator,
            )
        )
        values.append(value)
    return KLRewards(*map(torch.cat, zip(*pieces))), torch.cat(values)


def ppo_loss(
    config: PPOConfig,
    policy: Policy,
    reference: PreTrainedModel,
    batch: Batch,
    kl_loss_coef: float,
    ranks: Ranks,
) -> tuple[Tensor, dict[str, float]]:
    """Clipped policy loss + KL to the reference + value loss, and what they were made of.

    Each logit of both models is read once for the loss and its gradient together; where the loss
    holds no KL, the reference is not run. The loss is that of this rank's rows, such that its mean
    over ranks, and so DDP's mean of gradients, is the batch's; the metrics are the batch's.
    """
    n_tokens = batch.samples.mask.sum()
    batch = batch.each(lambda tensor: tensor[ranks.rows(len(tensor))])
    samples, n_answer = batch.samples, batch.samples.mask.shape[1]
    logits, values = policy(samples.ids, samples.attention_mask, n_answer)
    if kl_loss_coef > 0:
        with torch.no_grad():
            ref_logits, _ = causal_lm(reference, samples.ids, samples.attention_mask, n_answer)
    else:
        ref_logits = None
    loss, metrics = fused_policy_loss(
        logits,
        samples.answers,
        batch.logprobs,
        batch.advantages,
        samples.mask,
        ref_logits=ref_logits,
        kl_loss_coef=kl_loss_coef,
        clip_low=config.clip,
        clip_high=config.clip,
        denominator=n_tokens / ranks.n,
    )
    value_loss, _ = ppo_value_loss(
        values,
        batch.values,
        batch.returns,
        samples.mask,
        clip_range=config.value_clip,
        denominator=n_tokens / ranks.n,
    )
    share = samples.mask.sum() / n_tokens  # of this rank in what is averaged over tokens
    kl = metrics.get("kl", torch.zeros_like(loss))
    of_tokens = share * torch.stack([kl, metrics["approx_kl"], metrics["clip_fraction"]])
    of_ranks = torch.stack([loss.detach(), value_loss.detach()]) / ranks.n
    total = ranks.total(torch.cat([of_ranks, of_tokens]))
    policy_loss, value_loss_, kl_loss, approx_kl, clip_fraction = total.tolist()
    # Of ratios near 1, k3 is half the mean square of what they are off by.
    rms = (2 * abs(approx_kl)) ** 0.5
    return loss + config.value_coef * value_loss, {
        "policy_loss": policy_loss - kl_loss_coef * kl_loss,
        "value_loss": value_loss_,
        "kl_loss": kl_loss,
        "ratio_deviation": max(ranks.largest(metrics["ratio_max"]).item() - 1, rms),
        "clip_fraction": clip_fraction,
    }


def check_start(ratio_deviation: float, kl: float) -> None:
    """Nothing has been learned yet, so every ratio is 1, and every KL to the reference 0.

    Raises:
        RuntimeError: they are not; whatever makes them differ would be trained on as if it were
            the policy's doing.
    """
    if not ratio_deviation <= RATIO_TOLERANCE:
        raise RuntimeError(
            f"before the first step a policy ratio is off 1 by {ratio_deviation:.2g}: the loss "
            "scores answers differently from the rollout (dropout? padding? positions?)"
        )
    if not kl <= KL_TOLERANCE:
        raise RuntimeError(
            f"before the first step a token's KL to the reference is {kl:.2g}: the reference is "
            "not a copy of the policy, or the two are run differently"
        )
