"""Metrics and events for TensorBoard, Weights & Biases and MLflow, through their own libraries.

Each library is imported when its sink is made, not before. (`AuditLog` is a sink, too.)
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from kl_kernels import extras
from kl_kernels.checks import check_choice
from kl_kernels.forks import Owner
from kl_kernels.monitor.events import Event
from kl_kernels.monitor.names import NAMES, rename


class TensorBoardSink:
    """Scalars, and each event as text under "events/" + its kind.

    Args:
        writer: a folder for event files, or a `torch.utils.tensorboard.SummaryWriter`, which stays
            open when the sink closes.
        names: whose names metrics get, see `rename`.
        prefix: put before every name.

    Raises:
        ImportError: tensorboard is not installed.
        ValueError: there is no such `names`.
    """

    def __init__(self, writer: Any, *, names: str = "kl_kernels", prefix: str = "") -> None:
        check_choice("names", names, tuple(NAMES))
        self._names, self._prefix = names, prefix
        self._owns = isinstance(writer, (str, os.PathLike))
        if self._owns:
            tensorboard = library("tensorboard", "torch.utils.tensorboard")
            writer = tensorboard.SummaryWriter(os.fspath(writer))
        self._writer, self._owner = writer, Owner()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._check_owner()
        for name, value in rename(metrics, self._names, self._prefix).items():
            self._writer.add_scalar(name, value, step)

    def alert(self, event: Event) -> None:
        self._check_owner()
        self._writer.add_text(f"{self._prefix}events/{event.kind}", str(event), event.step)
        self._writer.flush()  # otherwise the event stays in memory for two minutes

    def close(self) -> None:
        if not self._owner.is_here:
            return
        if self._owns:
            self._writer.close()
        else:
            self._writer.flush()

    def _check_owner(self) -> None:
        """Refuse a forked child, which lacks the thread that empties the queue and would hang."""
        self._owner.check("a TensorBoardSink")


class WandbSink:
    """Metrics by `run.log`, events by `run.alert`, which sends a mail or a Slack message.

    Args:
        run: what `wandb.init` returned; None: the active one. It stays open when the sink closes.
        names: whose names metrics get, see `rename`.
        prefix: put before every name.
        step_metric: None: steps are the run's own. It takes no step below its last one, so this
            is for when nothing else logs to the run, or all count the same steps. A name, such as
            "train/global_step": steps are a metric of that name and the axis of the others, and
            the run's own steps are left to its other writers.
        level: of alerts: "INFO", "WARN" or "ERROR".
        wait_seconds: W&B sends no second alert of one kind for so long.

    Raises:
        ImportError: wandb is not installed.
        ValueError: there is no active run, or an argument has no such choice.
    """

    def __init__(
        self,
        run: Any = None,
        *,
        names: str = "kl_kernels",
        prefix: str = "",
        step_metric: str | None = None,
        level: str = "WARN",
        wait_seconds: float = 300.0,
    ) -> None:
        check_choice("names", names, tuple(NAMES))
        check_choice("level", level, ("INFO", "WARN", "ERROR"))
        self._run = run if run is not None else library("wandb").run
        if self._run is None:
            raise ValueError("run is None and no run is active; call wandb.init first")
        self._names, self._prefix, self._step_metric = names, prefix, step_metric
        self._level, self._wait_seconds = level, wait_seconds
        self._on_axis: set[str] = set()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        renamed = rename(metrics, self._names, self._prefix)
        if self._step_metric is None:
            self._run.log(renamed, step=step)
            return
        for name in renamed.keys() - self._on_axis:
            self._run.define_metric(name, step_metric=self._step_metric)
            self._on_axis.add(name)
        self._run.log({**renamed, self._step_metric: step})

    def alert(self, event: Event) -> None:
        # Titles are what W&B counts by, and may have 63 characters.
        self._run.alert(
            title=f"kl_kernels: {event.kind}"[:63],
            text=str(event),
            level=self._level,
            wait_duration=self._wait_seconds,
        )

    def close(self) -> None:
        """Nothing: the run is the caller's."""


class MLflowSink:
    """Metrics of a run, and the last event of each kind as the tag "alert." + kind.

    Tags, because runs can be searched by them: `tags."alert.kl_jump" LIKE "%"` finds every run with
    such an event. The events before the last are in an `AuditLog`.

    Args:
        run_id: None: the active run. It stays open when the sink closes.
        names: whose names metrics get, see `rename`.
        prefix: put before every name.
        tracking_uri: None: what MLflow is set to.

    Raises:
        ImportError: mlflow is not installed.
        ValueError: there is no active run, or no such `names`.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        names: str = "kl_kernels",
        prefix: str = "",
        tracking_uri: str | None = None,
    ) -> None:
        check_choice("names", names, tuple(NAMES))
        mlflow = library("mlflow")
        if run_id is None:
            active = mlflow.active_run()
            if active is None:
                raise ValueError("run_id is None and no run is active; call mlflow.start_run first")
            run_id = active.info.run_id
        self._metric = mlflow.entities.Metric
        self._client = mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._run_id, self._names, self._prefix = run_id, names, prefix

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.time_ns() // 10**6
        self._client.log_batch(
            self._run_id,
            metrics=[
                self._metric(name, float(value), now, step)
                for name, value in rename(metrics, self._names, self._prefix).items()
            ],
        )

    def alert(self, event: Event) -> None:
        self._client.set_tag(self._run_id, f"alert.{event.kind}", str(event))

    def close(self) -> None:
        """Nothing: the run is the caller's."""


def library(package: str, module: str = "") -> Any:
    """The dashboard's library; MissingPackageError, an ImportError, if it is not installed."""
    return extras.load(f"a run's record on {package}", package, module or package)
