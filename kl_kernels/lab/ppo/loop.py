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
takes its own rows of every minibatch; DDP averages their gradients, or FSDP2 does.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl_kernels import (
    AdaptiveKLController,
    FixedKLController,
    KLEarlyStop,
    PIKLController,
    ThresholdKLController,
    masked_mean,
)
from kl_kernels.lab.ppo.checkpoint import RunFolder, restore_rng
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.losses import check_reference
from kl_kernels.lab.ppo.optimise import Trainer
from kl_kernels.lab.ppo.policy import Policy, answer_texts, is_sharded, sample
from kl_kernels.lab.ppo.progress import UpdateProgress
from kl_kernels.lab.ppo.ranks import launch
from kl_kernels.lab.ppo.reference import make_reference, without_adapter
from kl_kernels.lab.ppo.report import MetricsLog, live_line
from kl_kernels.lab.ppo.reward import RewardFunction, scores_of
from kl_kernels.lab.ppo.rollout import shape_rewards, shape_scores, teach
from kl_kernels.lab.ppo.state import TrainingState, whole_weights
from kl_kernels.lab.ppo.watch import Watch
from kl_kernels.monitor.constraint import ConstraintViolation
from kl_kernels.rl.controllers import KLController
from kl_kernels.rl.measure import Unit


def train(
    config: PPOConfig,
    run: RunFolder,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    reward: RewardFunction,
    gold: Callable[[str], float] | None,
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """Train `lm`, or go on where the checkpoint in `run` ends; returns the model and its weights.

    Of several processes, each calls this with the same arguments; the first one writes.

    Raises:
        ValueError: the batch does not divide by the number of processes.
        RuntimeError: before the first step, the policy already differs from itself or from the
            reference.
        ConstraintViolation: an update went beyond its limits, and `constraint` is "raise".
    """
    accelerator, ranks = launch()
    ranks.check(config)

    torch.manual_seed(config.seed)
    lm, reference = make_reference(config, lm, accelerator.device)
    module = Policy(lm)
    optimizer = torch.optim.Adam(
        [
            {"params": trainable(module.lm), "lr": config.learning_rate},
            {"params": trainable(module.value_head), "lr": config.value_lr},
        ],
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_eps,
    )
    policy, optimizer = accelerator.prepare(module, optimizer)
    if is_sharded(module):
        register_fsdp_forward_method(module, "generate")
    controller = make_controller(config)
    state = TrainingState(module, optimizer, controller)
    constraint = config.update_constraint()
    early_stop = KLEarlyStop(config.target_kl, when=config.early_stop) if config.target_kl else None
    trainer = Trainer(
        config, accelerator, ranks, policy, reference, optimizer, early_stop, constraint
    )

    saved = state.load(run.checkpoint) if run.checkpoint.is_file() else None
    done = saved["updates"] if saved else 0
    watch = Watch(config, run, ranks, updates=done, policy=whole_weights(module))
    if saved:
        watch.monitor.load_state_dict(saved["monitor"])
        restore_rng(saved["rng"])
    elif constraint and constraint.action == "rollback":  # maybe of the first update
        state.save(run.checkpoint, done, ranks, monitor=watch.monitor.state_dict())

    log = ranks.on_first(lambda: MetricsLog(run.metrics, keep=done))
    progress = UpdateProgress(
        desc="PPO", initial=done, total=config.updates, disable=not ranks.first
    )
    with closing(watch), progress:
        for update in range(done + 1, config.updates + 1):
            started = time.perf_counter()
            kl_coef = controller.value

            # 1. Rollout: sample answers, and ask what they are worth.
            chosen = [
                prompts[i] for i in torch.randint(len(prompts), (config.batch_size,)).tolist()
            ]
            samples = sample(module, tokenizer, chosen, config.answer_tokens, ranks)
            own = chosen[ranks.rows(len(chosen))]
            prompt_texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in own]
            answers = answer_texts(samples, tokenizer)
            scores = ranks.each(partial(scores_of, reward, prompt_texts, answers))
            scores = scores.to(accelerator.device)

            # 2. Rewards: the score at the last token, -beta KL at every token.
            paid = shape_scores(config, scores, samples, tokenizer.eos_token_id)
            shaped, values = shape_rewards(config, policy, reference, samples, paid, kl_coef)
            if update == 1:
                check_reference(ranks.largest(shaped.kl.max()).item())

            # 3. Advantages: better or worse than the value head expected, token by token.
            batch, per_unit = teach(config, samples, shaped, values, ranks)
            kl_loss_coef = per_unit * kl_coef if config.kl_in_loss else 0.0

            # 4. Optimisation: a few clipped steps, each on a random part of the batch.
            before = state.copy() if constraint and constraint.undoes else None
            steps = trainer.update(update, batch, kl_loss_coef)
            if steps.action and before:
                state.undo(before)
            elif steps.action == "rollback":
                state.load(run.checkpoint)

            # 5. Control: beta follows the KL of the answers that were just sampled.
            mask = samples.mask
            controlled = controller.update(
                shaped.kl, config.batch_size, mask=mask, group=ranks.group
            )

            # 6. Report, then checkpoint: metrics after the checkpoint are dropped when resuming.
            scores = ranks.all_rows(scores)
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
                **steps.metrics(),
                "advantage_sd": 1 / per_unit,
                "stopped_early": steps.stopped_early,
                "violation": steps.violation.message if steps.violation else None,
                "seconds": time.perf_counter() - started,
                "sample": prompt_texts[0] + " |" + answers[0],
            }
            watch.update(record, controlled, steps.violation, shaped, mask)
            if ranks.first:
                log.append(record)
                progress.reach(update, live_line(record))
            if steps.action == "raise":
                raise ConstraintViolation(str(steps.violation))
            last = update == config.updates or steps.action == "stop"
            if last:  # before the checkpoint, after which nothing samples these answers again
                texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in chosen]
                watch.drift(ranks.all_rows(shaped.kl), batch.samples, texts, tokenizer)
            if last or update % config.checkpoint_every == 0:
                saved = state.save(
                    run.checkpoint, update, ranks, monitor=watch.monitor.state_dict()
                )
                watch.checkpoint(update, saved["policy"])
            if last:
                break
    trained = without_adapter(module.lm)
    return trained, whole_weights(trained)


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def make_controller(config: PPOConfig) -> KLController:
    """Beta, in score per nat of a whole answer."""
    start, target = config.kl_coef, config.kl_target
    unit: Unit = "sequence_sum"
    if config.controller == "adaptive":
        return AdaptiveKLController(start, target, config.kl_horizon, unit=unit)
    if config.controller == "threshold":
        return ThresholdKLController(start, target, unit=unit)
    if config.controller == "pi":
        return PIKLController(start, target, unit=unit, gain=config.kl_gain, lag=config.kl_lag)
    return FixedKLController(start, unit=unit)
