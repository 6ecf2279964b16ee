"""Proximal policy optimisation of a language model, from rollout to checkpoint, top to bottom.

    maximise  E[reward(prompt, answer)] - beta KL(policy || reference)

Each update samples answers, shapes their rewards, estimates advantages, and takes a few clipped
gradient steps (Schulman et al. 2017, arXiv 1707.06347; for language models Ziegler et al. 2019,
arXiv 1909.08593).

The KL per token is exact, a sum over the vocabulary instead of one sampled log-ratio. As a reward
exact KL credits earlier tokens but not the token just sampled, which it does not depend on; that
token's share is the gradient of the KL itself, added to the loss. Together they are the gradient of
the objective above. (With kl_estimator k1 the sampled log-ratio in the reward does both, noisily.)

On several processes (`ranks.py`) each samples, scores and shapes its local rows of the batch, and
takes its local rows of every minibatch; DDP or FSDP2 averages their gradients.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl_kernels import masked_mean
from kl_kernels.lab.ppo.checkpoint import RunFolder, restore_rng
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.controller import ControllerConstants, make_controller
from kl_kernels.lab.ppo.losses import check_initial_kl
from kl_kernels.lab.ppo.optimise import AdamConstants, Trainer, UpdateConstants, make_optimizer
from kl_kernels.lab.ppo.policy import Policy, answer_texts, prepare, prompt_texts, sample
from kl_kernels.lab.ppo.ranks import Ranks, launch
from kl_kernels.lab.ppo.ref_model import make_ref_model, merge_adapter
from kl_kernels.lab.ppo.reward import RewardFunction, score_answers, score_metrics
from kl_kernels.lab.ppo.rollout import (
    AdvantageConstants,
    KLRewardConstants,
    ScoreConstants,
    compute_advantages,
    compute_kl_rewards,
    shape_scores,
)
from kl_kernels.lab.ppo.run_logger import RunLogger
from kl_kernels.lab.ppo.state import TrainingState, full_state_dict
from kl_kernels.monitor.constraint import ConstraintViolation


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

    All processes call this with the same arguments; the main one writes.

    Raises:
        ValueError: the batch does not divide by the number of processes.
        RuntimeError: before the first step, the policy differs from itself or from the reference.
        ConstraintViolation: an update went beyond its limits, and `constraint` is "raise".
    """
    accelerator, ranks = launch()
    ranks.check_batch_size(config.batch_size, config.minibatches)
    torch.manual_seed(config.seed)
    lm, ref_model = make_ref_model(lm, accelerator.device, config.adapter_rank)
    policy = Policy(lm)
    optimizer = make_optimizer(policy, config.subset(AdamConstants))
    wrapped_policy, optimizer = prepare(policy, optimizer, accelerator)
    controller = make_controller(config.subset(ControllerConstants))
    early_stop, constraint = config.kl_early_stop(), config.update_constraint()
    constants = config.subset(UpdateConstants)
    trainer = Trainer(
        accelerator, ranks, wrapped_policy, ref_model, optimizer, early_stop, constraint, constants
    )
    state = TrainingState(policy, optimizer, controller)
    logger, done = start_or_resume(config, run, ranks, state)

    with closing(logger):
        for update in range(done + 1, config.updates + 1):
            started, kl_coef = time.perf_counter(), controller.value

            # 1. Sample: answer a batch of random prompts.
            drawn = [prompts[i] for i in torch.randint(len(prompts), (config.batch_size,)).tolist()]
            samples = sample(policy, tokenizer, drawn, config.answer_tokens, ranks)
            mask = samples.mask

            # 2. Score: one number per answer, from its text.
            texts = prompt_texts(drawn[ranks.local_rows(len(drawn))], tokenizer)
            answers = answer_texts(samples, tokenizer)
            scores = score_answers(reward, texts, answers, ranks).to(accelerator.device)

            # 3. Shape rewards: the score at the last token, -beta KL at every token.
            #    The same pass over the logits computes log-probabilities, KL and entropy.
            shaped_scores = shape_scores(
                scores, samples, tokenizer.eos_token_id, config.subset(ScoreConstants)
            )
            reward_constants = config.subset(KLRewardConstants)
            rollout, values = compute_kl_rewards(
                wrapped_policy, ref_model, samples, shaped_scores, kl_coef, reward_constants
            )
            if update == 1:
                check_initial_kl(ranks.max(rollout.kl.max()).item())

            # 4. Advantages: better or worse than the value head expected, token by token.
            batch, units_per_score = compute_advantages(
                samples, rollout, values, ranks, config.subset(AdvantageConstants)
            )
            kl_loss_coef = units_per_score * kl_coef if config.kl_in_loss else 0.0

            # 5. Update epochs: clipped steps on random parts of the batch, undone if too far.
            snapshot = state.snapshot() if constraint and constraint.undoes else None
            result = trainer.run_epochs(batch, kl_loss_coef, update=update)
            state.undo(result.action, snapshot, run.checkpoint)

            # 6. Adapt the coefficient: beta follows the KL of the answers just sampled.
            adapted = controller.update(rollout.kl, config.batch_size, mask=mask, group=ranks.group)

            # 7. Log.
            record = {
                "update": update,
                **score_metrics(scores, answers, gold, ranks),
                "kl": adapted.kl,
                "kl_coef": kl_coef,
                "entropy": masked_mean(rollout.entropy, mask, group=ranks.group).item(),
                "length": batch.samples.mask.sum(1).float().mean().item(),
                **result.metrics(),
                "advantage_sd": 1 / units_per_score,
                **result.limits(),
                "seconds": time.perf_counter() - started,
                "sample": texts[0] + " |" + answers[0],
            }
            logger.log_update(record, adapted, result.violation, rollout, mask)
            if result.action == "raise":
                raise ConstraintViolation(str(result.violation))

            # 8. Checkpoint: on resuming, metrics after it are dropped.
            last = update == config.updates or result.action == "stop"
            if last:  # before the checkpoint: a run resumed from it has no answers to summarise
                logger.log_drift(ranks.gather(rollout.kl), batch.samples, drawn, tokenizer)
            if last or update % config.checkpoint_every == 0:
                save_checkpoint(run, update, ranks, state, logger)
            if last:
                break
    trained = merge_adapter(policy.lm)
    return trained, full_state_dict(trained)


def start_or_resume(
    config: PPOConfig, run: RunFolder, ranks: Ranks, state: TrainingState
) -> tuple[RunLogger, int]:
    """Load the checkpoint, if there is one; returns the run's logger, and how many updates it has.

    A new run that may be rolled back gets its first checkpoint here.
    """
    saved = state.load(run.checkpoint) if run.checkpoint.is_file() else None
    done = saved["updates"] if saved else 0
    logger = RunLogger(config, run, ranks, done, full_state_dict(state.policy))
    constraint = config.update_constraint()
    if saved:
        logger.monitor.load_state_dict(saved["monitor"])
        restore_rng(saved["rng"])
    elif constraint and constraint.action == "rollback":
        state.save(run.checkpoint, done, ranks, monitor=logger.monitor.state_dict())
    return logger, done


def save_checkpoint(
    run: RunFolder, update: int, ranks: Ranks, state: TrainingState, logger: RunLogger
) -> None:
    saved = state.save(run.checkpoint, update, ranks, monitor=logger.monitor.state_dict())
    logger.log_checkpoint(update, saved["policy"])
