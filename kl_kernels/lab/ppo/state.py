"""The state that training changes: copied and restored within an update, saved between updates.

A checkpoint holds full tensors, whatever the number of processes and however they share the
model (DDP's replicas, FSDP2's shards), so that it can be resumed on another number of them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from kl_kernels.lab.ppo.checkpoint import load_state, rng_state, save_state
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.rl.controllers import KLController


class TrainingState:
    """Policy, optimizer and controller of a run."""

    def __init__(self, policy: nn.Module, optimizer: Optimizer, controller: KLController) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.controller = controller

    def snapshot(self) -> dict[str, Any]:
        """Copy weights and optimizer, as they are on this process."""
        return copy.deepcopy(
            {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        )

    def undo(self, action: str | None, snapshot: dict[str, Any] | None, checkpoint: Path) -> None:
        """Undo an update if the constraint's action asks for it.

        "rollback" loads the last checkpoint; other actions that undo had a snapshot taken before.
        """
        if action and snapshot:
            self.restore(snapshot)
        elif action == "rollback":
            self.load(checkpoint)

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a snapshot, bit for bit, and only once: later steps change its tensors."""
        self.policy.load_state_dict(snapshot["policy"])
        self.optimizer.load_state_dict(snapshot["optimizer"])

    def save(self, path: Path, updates: int, ranks: Ranks, **others: Any) -> dict[str, Any]:
        """Write a checkpoint; returns it, on every process, once it is there."""
        state = {
            "policy": tree_map(full_tensor, self.policy.state_dict()),
            "optimizer": tree_map(full_tensor, self.optimizer.state_dict()),
            "controller": self.controller.state_dict(),
            "rng": rng_state(),
            "updates": updates,
            **others,
        }
        ranks.on_main(lambda: save_state(path, state))
        return state

    def load(self, path: Path) -> dict[str, Any]:
        """Take policy, optimizer and controller from a checkpoint; returns all of it."""
        state = load_state(path)
        current = self.policy.state_dict()
        self.policy.load_state_dict(
            {name: local_shard(value, current[name]) for name, value in state["policy"].items()}
        )
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        moments = {
            index: {name: local_shard(value, parameters[index]) for name, value in moment.items()}
            for index, moment in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self.controller.load_state_dict(state["controller"])
        return state


def full_tensor(x: Any) -> Any:
    """Put a tensor together from all processes' shards of it, on each of them."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def local_shard(x: Any, like: Tensor) -> Any:
    """Shard a tensor as `like` is, if it is; Adam's step count never is."""
    if isinstance(like, DTensor) and isinstance(x, Tensor) and x.ndim > 0:
        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Gather the module's weights, as `save_pretrained` takes them."""
    with torch.no_grad():
        return {name: full_tensor(value) for name, value in module.state_dict().items()}
