"""A callback that watches the KL logged by a trainer built on transformers' `Trainer`."""

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

# Key of the monitor's state in a checkpoint's trainer_state.json.
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

    A second `trainer.train()` goes on with what the monitor has seen, and the monitor's steps go on
    counting where the trainer's begin anew. The callback never ends a run otherwise than by
    `stop_on`: a figure that is no number, or a checkpoint with the state of another monitor, is
    left out and told once, by a RuntimeWarning.

    Args:
        monitor: in the unit of the trainer's KL.
        stop_on: kinds of events (see `KLMonitor`) after which training ends, with this step done.

    Attributes:
        events: all events so far.

    Raises:
        TypeError: stop_on is a string.

    Examples:
        >>> from kl_kernels import KLMonitor
        >>> from kl_kernels.integrations.trl_callback import KLMonitorCallback
        >>> monitor = KLMonitor(kl_budget=0.5, unit="token_mean")
        >>> callback = KLMonitorCallback(monitor, stop_on={"kl_budget"})
        >>> callback.events
        []
    """

    def __init__(self, monitor: KLMonitor, *, stop_on: Collection[str] = ()) -> None:
        if isinstance(stop_on, str):
            raise TypeError(f"stop_on is {stop_on!r}; it must be a collection of kinds of events")
        self.monitor = monitor
        self.stop_on = frozenset(stop_on)
        self.events: list[Any] = []
        self._offset = 0  # the monitor's step less the trainer's
        self._told: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        saved = state.stateful_callbacks.get(STATE_KEY)
        if saved is not None:
            self._restore(saved)
        self._step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        logs = logs or {}
        name = self._name(f"kl_{self.monitor.unit}")
        if logs.get(name) is None:
            self._complain(logs)
            return
        kl = self._figure(logs, name)
        if kl is None:
            return
        watched = ("entropy", "reward", "grad_norm", "kl_coef")
        others: dict[str, Any] = {ours: self._figure(logs, self._name(ours)) for ours in watched}
        events = self.monitor.observe(self._step(state.global_step), kl=kl, **others)
        self.events += events
        saved = {"offset": self._offset, "monitor": self.monitor.state_dict()}
        state.stateful_callbacks[STATE_KEY] = saved
        if any(event.kind in self.stop_on for event in events):
            control.should_training_stop = True

    def _restore(self, saved: Any) -> None:
        try:
            if not isinstance(saved, Mapping) or not isinstance(saved.get("offset"), int):
                raise ValueError(f"it is {saved!r:.80}")
            self.monitor.load_state_dict(saved.get("monitor", {}))
            self._offset = saved["offset"]
        except ValueError as error:
            self._tell(
                STATE_KEY,
                f"the checkpoint's state of {STATE_KEY} is another monitor's, and is left out: "
                f"{error}",
            )

    def _step(self, global_step: int) -> int:
        """Return the monitor's step at one of the trainer's, at least the last one it observed."""
        if self.monitor.step is not None:
            self._offset = max(self._offset, self.monitor.step - global_step)
        return global_step + self._offset

    def _figure(self, logs: Mapping[str, Any], name: str) -> float | None:
        """Return a logged number, which may be a tensor or text; None where there is none."""
        value = logs.get(name)
        if value is None:
            return None
        try:
            return float(value.item() if hasattr(value, "item") else value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            self._tell(name, f"{name!r} is {value!r:.80} in the trainer's logs, and is left out")
            return None

    @staticmethod
    def _name(metric: str) -> str:
        return NAMES["trl"][metric]

    def _complain(self, logs: Mapping[str, Any]) -> None:
        """Warn once about training logs without a KL; those of an evaluation never have one."""
        if "loss" not in logs:
            return
        other = {"token_mean": "sequence_sum", "sequence_sum": "token_mean"}[self.monitor.unit]
        why = "the trainer logs none; is its beta 0?"
        if self._name(f"kl_{other}") in logs:
            why = f"the trainer's is in another unit: KLMonitor(unit={other!r})"
        name = self._name(f"kl_{self.monitor.unit}")
        self._tell(
            name,
            f"no KL is watched: a KLMonitor in {self.monitor.unit!r} needs {name!r} in the logs, "
            f"and {why}",
        )

    def _tell(self, what: str, message: str) -> None:
        """Warn once about each thing."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(message, RuntimeWarning, stacklevel=4)
