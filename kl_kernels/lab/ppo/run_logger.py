"""The log of a run while it goes: progress and alarms, metrics, an audit log, a dashboard."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kl_kernels import KLRewards, extras
from kl_kernels.files import PRIVATE_FOLDER_MODE, make_folder, write_text
from kl_kernels.lab.ppo.checkpoint import RunFolder
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.policy import Samples, prompt_texts
from kl_kernels.lab.ppo.progress import UpdateProgress
from kl_kernels.lab.ppo.ranks import Ranks
from kl_kernels.lab.ppo.report import MetricsLog, Record, progress_line
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.drift import summarize_drift
from kl_kernels.monitor.events import Event, Sink
from kl_kernels.monitor.hashes import model_hash
from kl_kernels.monitor.monitor import KLMonitor
from kl_kernels.monitor.sinks import MLflowSink, TensorBoardSink, WandbSink, library
from kl_kernels.rl.controllers import KLUpdate


class RunLogger:
    """The run's `KLMonitor`, alike on all ranks, and everything that the main rank writes.

    Raises:
        ValueError: the run's audit log was tampered with, or belongs to a run still going; or
            metrics of updates that the checkpoint has are missing.
        ImportError: the library of `log_to` is missing.
    """

    def __init__(
        self,
        config: PPOConfig,
        run: RunFolder,
        ranks: Ranks,
        updates: int,  # that the policy has behind it
        policy: dict[str, Tensor],  # its weights
    ) -> None:
        self.run = run
        self.group = ranks.group
        self.audit: AuditLog | None = None
        self.metrics: MetricsLog | None = None
        sinks: list[Sink] = []

        def open_files() -> None:
            constants = dataclasses.asdict(config)
            header = {"config": constants, "updates": updates, "policy": model_hash(policy)}
            self.audit = AuditLog(run.audit, header=header)
            if config.log_to != "none":
                sinks.append(make_sink(config, run))
            self.metrics = MetricsLog(run.metrics, keep=updates)

        ranks.on_main(open_files)
        self.monitor = KLMonitor(config.kl_budget or None, sinks=sinks)
        self.progress = UpdateProgress(
            desc="PPO", initial=updates, total=config.updates, disable=not ranks.is_main
        )

    def log_update(
        self,
        record: Record,
        adapted: KLUpdate,
        violation: Event | None,
        rollout: KLRewards,  # from this rank's answers, before the update
        mask: Tensor,  # [B, T]
    ) -> None:
        """Show an update to the monitor, add its events to the record, and write that."""
        events = self.monitor.observe(
            record["update"] - 1,  # updates before the policy that sampled these answers
            kl=adapted.kl,
            kl_coef=record["kl_coef"],
            entropy=rollout.entropy,
            logprob=rollout.logprob,
            ratio=record["ratio_max"],
            reward=record["proxy"],
            grad_norm=record["grad_norm"],
            mask=mask,
            group=self.group,
        )
        record["events"] = [event.kind for event in events]
        if self.audit is None or self.metrics is None:
            return
        self.audit.append("update", {**record, "kl_coef_next": adapted.value})
        for event in [*events, *([violation] if violation else [])]:
            self.audit.alert(event)
            tqdm.write(f"warning: {event}")
        self.metrics.append(record)
        self.progress.reach(record["update"], progress_line(record))

    def log_checkpoint(self, updates: int, policy: dict[str, Tensor]) -> None:
        """Put the hash of a checkpoint's weights on record, once it is written."""
        if self.audit:
            self.audit.append("checkpoint", {"updates": updates, "policy": model_hash(policy)})

    def log_drift(
        self,
        kl: Tensor,  # [B, T]
        samples: Samples,
        prompts: list[list[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Tell which prompts, positions and tokens of the last rollout carry the KL."""
        if self.audit is None:
            return
        summary = summarize_drift(
            kl,
            samples.mask,
            samples.answers,
            prompt_texts(prompts, tokenizer),
            decode=lambda i: tokenizer.decode([i]),
        ).to_dict()
        write_text(self.run.drift, json.dumps(summary, indent=1) + "\n")
        self.audit.append("drift", summary)

    def close(self) -> None:
        self.progress.close()
        for sink in self.monitor.sinks:
            sink.close()
        if self.audit:
            self.audit.close()


def check_library(log_to: str) -> None:
    """Check that the dashboard's library is installed.

    Raises:
        MissingPackageError: it is not; a ValueError.
    """
    if log_to != "none":
        extras.need(f"log_to {log_to!r}", log_to)


def make_sink(config: PPOConfig, run: RunFolder) -> Sink:
    """Open a dashboard of the run, kept in its folder where the library can do that.

    Raises:
        ImportError: the library is not installed; `check_library` tells beforehand.
    """
    names, constants = config.metric_names, dataclasses.asdict(config)
    if config.log_to in ("tensorboard", "wandb"):
        # The libraries write more there, with modes of their own: W&B notes the account, the
        # machine, and where the code came from.
        make_folder(run.path / config.log_to, PRIVATE_FOLDER_MODE)
    if config.log_to == "tensorboard":
        return TensorBoardSink(run.path / "tensorboard", names=names)
    if config.log_to == "wandb":
        dashboard: Any = library("wandb")
        name = run.path.name
        started = dashboard.init(project="kl_kernels", name=name, dir=run.path, config=constants)
        return WandbSink(started, names=names)
    dashboard = library("mlflow")
    dashboard.start_run(run_name=run.path.name)
    dashboard.log_params(constants)
    return MLflowSink(names=names)
