"""The steps of one update, and what keeps them within bounds."""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator

from kl_kernels import KLEarlyStop
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.losses import check_ratio, moved, ppo_loss
from kl_kernels.lab.ppo.policy import Policy
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.reference import Reference
from kl_kernels.lab.ppo.rollout import Batch
from kl_kernels.lab.ppo.state import whole
from kl_kernels.monitor.constraint import UpdateConstraint
from kl_kernels.monitor.events import Event


@dataclass
class Steps:
    """What an update measured, and how it ended."""

    losses: list[dict[str, float]] = field(default_factory=list)  # of each minibatch looked at
    grad_norms: list[float] = field(default_factory=list)  # of each step taken, before clipping
    stopped_early: bool = False
    violation: Event | None = None
    action: str | None = None  # what the constraint asks for, given a violation

    def metrics(self) -> dict[str, Any]:
        """Means over the minibatches, but of the ratio the largest."""
        means = {name: fmean(loss[name] for loss in self.losses) for name in self.losses[0]}
        return {
            **means,
            "ratio_max": max(loss["ratio_max"] for loss in self.losses),
            "grad_norm": fmean(self.grad_norms) if self.grad_norms else None,
            "steps": len(self.grad_norms),
        }


@dataclass(frozen=True)
class Trainer:
    """Takes clipped steps on a batch, each on a random part of it."""

    config: PPOConfig
    accelerator: Accelerator
    ranks: Ranks
    policy: Policy
    reference: Reference
    optimizer: torch.optim.Optimizer
    early_stop: KLEarlyStop | None
    constraint: UpdateConstraint | None

    def update(self, update: int, batch: Batch, kl_loss_coef: float) -> Steps:
        """The steps of update number `update`.

        Raises:
            RuntimeError: before the very first, the policy already differs from itself.
        """
        steps = Steps()
        for _ in range(self.config.epochs):
            for rows in torch.randperm(self.config.batch_size).chunk(self.config.minibatches):
                part = batch.rows(rows.to(self.accelerator.device))
                loss, metrics = ppo_loss(
                    self.config, self.policy, self.reference, part, kl_loss_coef, self.ranks
                )
                kl, ratio = metrics["approx_kl"], metrics["ratio_max"]
                if update == 1 and not steps.losses:
                    check_ratio(kl, ratio)
                steps.losses.append(metrics)
                if self.early_stop and self.early_stop.before_step(kl):
                    steps.stopped_early = True
                    break
                if self._violates(steps, update, kl, ratio):
                    return steps
                steps.grad_norms.append(self._step(loss))
            if self.early_stop and self.early_stop.after_epoch():
                steps.stopped_early = True
                break
        if self.constraint:  # nobody has looked since the last step
            self._violates(steps, update, *moved(self.config, self.policy, batch, self.ranks))
        return steps

    def _step(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        return float(whole(norm))

    def _violates(self, steps: Steps, update: int, kl: float, ratio: float) -> bool:
        """Whether this update has to end here."""
        if self.constraint is None:
            return False
        violation = steps.violation or self.constraint.check(update, kl=kl, ratio=ratio)
        if violation:
            steps.violation, steps.action = violation, self.constraint.action
        return steps.action not in (None, "log")
