"""The update epochs: clipped steps on one rollout, and the limits that end them."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator

from kl_kernels import KLEarlyStop
from kl_kernels.lab.ppo.losses import LossConstants, check_initial_ratio, kl_after_update, ppo_loss
from kl_kernels.lab.ppo.policy import Policy
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.ref_model import RefModel
from kl_kernels.lab.ppo.rollout import Batch
from kl_kernels.lab.ppo.state import full_tensor
from kl_kernels.monitor.constraint import UpdateConstraint
from kl_kernels.monitor.events import Event


@dataclass(frozen=True)
class AdamConstants:
    """Constants of `make_optimizer`, as `PPOConfig` has them."""

    learning_rate: float
    value_lr: float
    adam_beta1: float
    adam_beta2: float
    adam_eps: float


def make_optimizer(policy: Policy, constants: AdamConstants) -> torch.optim.Optimizer:
    """Make Adam, with a learning rate for the language model and one for the value head."""
    return torch.optim.Adam(
        [
            {"params": trainable(policy.lm), "lr": constants.learning_rate},
            {"params": trainable(policy.value_head), "lr": constants.value_lr},
        ],
        betas=(constants.adam_beta1, constants.adam_beta2),
        eps=constants.adam_eps,
    )


def trainable(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


@dataclass
class UpdateResult:
    """Measurements of an update, and how it ended."""

    losses: list[dict[str, float]] = field(default_factory=list)  # one for each minibatch looked at
    grad_norms: list[float] = field(
        default_factory=list
    )  # one for each step taken, before clipping
    stopped_early: bool = False
    violation: Event | None = None
    action: str | None = None  # that the constraint asks for, given a violation

    def metrics(self) -> dict[str, Any]:
        """Average over the minibatches, but for the ratio take the largest."""
        means = {name: fmean(loss[name] for loss in self.losses) for name in self.losses[0]}
        return {
            **means,
            "ratio_max": max(loss["ratio_max"] for loss in self.losses),
            "grad_norm": fmean(self.grad_norms) if self.grad_norms else None,
            "steps": len(self.grad_norms),
        }

    def limits(self) -> dict[str, Any]:
        """Tell whether a limit ended the update, and which."""
        return {
            "stopped_early": self.stopped_early,
            "violation": self.violation.message if self.violation else None,
        }


@dataclass(frozen=True)
class UpdateConstants(LossConstants):
    """Constants of `Trainer`, as `PPOConfig` has them: those of the loss, and of the steps."""

    epochs: int
    minibatches: int
    max_grad_norm: float


@dataclass(frozen=True)
class Trainer:
    """Takes clipped steps on a batch, each on a random part of it."""

    accelerator: Accelerator
    ranks: Ranks
    policy: Policy
    ref_model: RefModel
    optimizer: torch.optim.Optimizer
    early_stop: KLEarlyStop | None
    constraint: UpdateConstraint | None
    constants: UpdateConstants

    def run_epochs(self, batch: Batch, kl_loss_coef: float, *, update: int) -> UpdateResult:
        """Take the steps of update number `update`.

        Raises:
            RuntimeError: before the very first, the policy already differs from itself.
        """
        result = UpdateResult()
        n_answers, minibatches = len(batch.logprobs), self.constants.minibatches
        for _ in range(self.constants.epochs):
            for rows in torch.randperm(n_answers).chunk(minibatches):
                minibatch = batch.select(rows.to(self.accelerator.device))
                loss, metrics = ppo_loss(
                    self.policy, self.ref_model, minibatch, self.ranks, kl_loss_coef, self.constants
                )
                kl, ratio = metrics["approx_kl"], metrics["ratio_max"]
                if update == 1 and not result.losses:
                    check_initial_ratio(kl, ratio)
                result.losses.append(metrics)
                if self.early_stop and self.early_stop.before_step(kl):
                    result.stopped_early = True
                    break
                if self._must_end(result, update, kl, ratio):
                    return result
                result.grad_norms.append(self._step(loss))
            if self.early_stop and self.early_stop.after_epoch():
                result.stopped_early = True
                break
        if self.constraint:  # the last step has not been checked yet
            kl, ratio = kl_after_update(self.policy, batch, minibatches, self.ranks)
            self._must_end(result, update, kl, ratio)
        return result

    def _step(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(
            self.policy.parameters(), self.constants.max_grad_norm
        )
        self.optimizer.step()
        return float(full_tensor(norm))

    def _must_end(self, result: UpdateResult, update: int, kl: float, ratio: float) -> bool:
        """Check the update against its limits; True if it must end here."""
        if self.constraint is None:
            return False
        violation = result.violation or self.constraint.check(update, kl=kl, ratio=ratio)
        if violation:
            result.violation, result.action = violation, self.constraint.action
        return result.action not in (None, "log")
