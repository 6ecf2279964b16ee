"""The grid of a study, runs of every beta with every seed, and the folder that holds it."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kl_kernels.files import check_links, make_folder, write_text
from kl_kernels.info import facts
from kl_kernels.lab.ppo.checkpoint import RunFolder
from kl_kernels.lab.ppo.config import PPOConfig

ADAPTIVE = "adaptive"
BETAS = ("0", "0.03", "0.1", "0.3", "1", "5", ADAPTIVE)
N_SEEDS = 3
N_SEQUENCES = 1024


@dataclass(frozen=True)
class Plan:
    """The runs of a study. Betas are numbers as text, in the order of reports, or "adaptive".

    Raises:
        ValueError: a beta or a number is not accepted, or the constants have no gold score.
    """

    constants: PPOConfig  # all runs', apart from beta and seed; its seed is the first one
    betas: tuple[str, ...] = BETAS
    n_seeds: int = N_SEEDS
    n_sequences: int = N_SEQUENCES  # sampled from a trained policy to compare estimators

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(map(canonical_beta, self.betas)))
        if not self.betas or len(set(self.betas)) < len(self.betas):
            raise ValueError(f"betas is '{','.join(self.betas)}'; each must be there once")
        if self.n_seeds < 1:
            raise ValueError(f"seeds is {self.n_seeds}; it must be at least 1")
        if self.n_sequences < 2:
            raise ValueError(f"sequences is {self.n_sequences}; it must be at least 2")
        if self.constants.controller == "fixed":
            raise ValueError(
                "controller is 'fixed', which betas says with a number; it is for 'adaptive' here"
            )
        if self.constants.reward:
            raise ValueError(
                f"reward is {self.constants.reward!r}; a study compares the reward with the gold "
                "score it stands for, which only the embedded reward model has"
            )
        for beta in self.betas:
            self.config(beta, self.constants.seed)

    @property
    def seeds(self) -> range:
        return range(self.constants.seed, self.constants.seed + self.n_seeds)

    @property
    def n_updates(self) -> int:
        """Count the updates of all runs together."""
        return len(self.betas) * self.n_seeds * self.constants.updates

    def config(self, beta: str, seed: int) -> PPOConfig:
        if beta == ADAPTIVE:
            return dataclasses.replace(self.constants, seed=seed)
        return dataclasses.replace(
            self.constants, controller="fixed", kl_coef=float(beta), seed=seed
        )

    def to_json(self) -> str:
        plan = dataclasses.asdict(self)
        return json.dumps(plan | {"facts": facts()}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        fields: dict[str, Any] = json.loads(text)
        del fields["facts"]
        return cls(**fields | {"constants": PPOConfig(**fields["constants"])})


def canonical_beta(text: str) -> str:
    """One spelling for a number: 0.10 and 0.1 are the same beta."""
    try:
        if text.strip() == ADAPTIVE:
            return ADAPTIVE
        beta = float(text)
    except (AttributeError, ValueError):  # a plan's file may hold anything
        beta = math.nan
    if not 0 <= beta < math.inf:
        raise ValueError(f"betas holds {text!r}; accepted: numbers from 0 on, and {ADAPTIVE!r}")
    return f"{beta:g}"


def described(beta: str) -> str:
    return "adaptive beta" if beta == ADAPTIVE else f"beta = {beta}"


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study."""

    path: Path

    @property
    def plan(self) -> Path:
        return self.path / "study.json"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def data(self) -> Path:
        return self.path / "report.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def start(self, seed: int) -> RunFolder:
        """The reference and the reward model that all runs of a seed start from."""
        return RunFolder(self.path / "starts" / f"seed-{seed}")

    def run(self, beta: str, seed: int) -> RunFolder:
        return RunFolder(self.path / "runs" / f"beta-{beta}-seed-{seed}")

    def log(self, run: RunFolder) -> Path:
        return self.path / "logs" / f"{run.path.parent.name}-{run.path.name}.log"

    def estimates(self, beta: str, seed: int) -> Path:
        return self.path / "estimates" / f"beta-{beta}-seed-{seed}.pt"

    def picture(self, name: str) -> Path:
        return self.path / f"{name}.png"


def create_study(path: Path, plan: Plan) -> StudyFolder:
    """A new folder holding `plan`.

    Raises:
        ValueError: the folder exists and is not empty, or cannot be written.
    """
    folder = StudyFolder(path)
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"out is '{path}', which already exists; choose another folder, "
                f"or continue the study in it with --resume {path}"
            )
        for part in ("starts", "runs", "logs", "estimates"):
            make_folder(path / part)
        write_text(folder.plan, plan.to_json())
    except OSError as error:
        raise ValueError(f"out is '{path}', which cannot be written: {error}") from error
    return folder


def open_study(path: Path) -> tuple[StudyFolder, Plan]:
    """A study to continue, and its plan.

    Raises:
        ValueError: the folder holds no study, one of another version, or links that lead out of
            it.
    """
    folder = StudyFolder(path)
    if not folder.plan.is_file():
        raise ValueError(f"resume is '{path}', which holds no study (no {folder.plan.name})")
    check_links("resume", path)
    try:
        return folder, Plan.from_json(folder.plan.read_text(encoding="utf-8"))
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"resume is '{path}', whose {folder.plan.name} is not usable: {error}"
        ) from error
