"""Watches the KL that a trainer on transformers' `Trainer` logs."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import Any

from kl_kernels import extras
from kl_kernels.monitor.monitor import KLMonitor
from kl_kernels.monitor.names import NAMES

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise extras.MissingPackageError(
        extras.sentence("kl_kernels.integrations.trl", "transformers")
    ) from error

# Where the monitor's state is kept in a checkpoint's trainer_state.json.
STATE_KEY = "kl_kernels.KLMonitor"


class KLMonitorCallback(TrainerCallback):
    """Feeds what the trainer logs to a `KLMonitor`, and ends training on the events you name.

        monitor = KLMonitor(kl_budget=0.5, unit="token_mean")
        trainer.add_callback(KLMonitorCallback(monitor, stop_on={"kl_budget"}))

    It reads `kl` (GRPO and RLOO: nats, mean over tokens, so `unit="token_mean"`) or `objective/kl`
    (PPO: nats per answer, `unit="sequence_sum"`), and, where they are logged, `entropy`, `reward`,
    `grad_norm` and the KL coefficient. A trainer logs a KL only if its `beta` is not 0. GRPO's is
    an estimate from the sampled tokens, weighted by the importance ratio where it corrects for it:
    noisier than an exact KL.

    The monitor's state goes into the trainer's checkpoints and comes back from them. All processes
    see the same figures and agree; give sinks such as an `AuditLog` to the monitor of the main
    process alone.

    Args:
        monitor: in the unit of the trainer's KL.
        stop_on: kinds of events (see `KLMonitor`) after which training ends, with this step done.

    Attributes:
        events: all events so far.
    """

    def __init__(self, monitor: KLMonitor, *, stop_on: Collection[str] = ()) -> None:
        if isinstance(stop_on, str):
            raise TypeError(f"stop_on is {stop_on!r}; it has to be a collection of kinds of events")
        self.monitor = monitor
        self.stop_on = frozenset(stop_on)
        self.events: list[Any] = []
        self._warned = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if (saved := state.stateful_callbacks.get(STATE_KEY)) is not None:
            self.monitor.load_state_dict(saved)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        kl = logs.get(self._name(f"kl_{self.monitor.unit}"))
        if kl is None:
            self._complain(logs)
            return
        watched = {"entropy": "entropy", "reward": "reward", "grad_norm": "grad_norm"}
        others = {name: logs.get(self._name(ours)) for name, ours in watched.items()}
        others["kl_coef"] = logs.get(self._name("kl_coef"))
        events = self.monitor.observe(state.global_step, kl=kl, **others)
        self.events += events
        state.stateful_callbacks[STATE_KEY] = self.monitor.state_dict()
        if any(event.kind in self.stop_on for event in events):
            control.should_training_stop = True

    @staticmethod
    def _name(metric: str) -> str:
        return NAMES["trl"][metric]

    def _complain(self, logs: Mapping[str, Any]) -> None:
        """Once, of training steps whose logs have no KL: those of evaluation never have."""
        if self._warned or "loss" not in logs:
            return
        self._warned = True
        other = {"token_mean": "sequence_sum", "sequence_sum": "token_mean"}[self.monitor.unit]
        why = "the trainer logs none; is its beta 0?"
        if self._name(f"kl_{other}") in logs:
            why = f"the trainer's is in another unit: KLMonitor(unit={other!r})"
        warnings.warn(
            f"no KL is watched: a KLMonitor in {self.monitor.unit!r} needs "
            f"{self._name(f'kl_{self.monitor.unit}')!r} in the logs, and {why}",
            RuntimeWarning,
            stacklevel=2,
        )
