"""Run folders: the files of a run, written so that a crash at any moment loses nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_kernels.files import (
    FILE_MODE,
    FOLDER_MODE,
    check_links,
    make_folder,
    sync_folder,
    write_atomically,
    write_text,
)
from kl_kernels.lab.ppo.config import PPOConfig

if TYPE_CHECKING:  # `ppo --help` and `study --help` also work without transformers
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.json"

    @property
    def pretraining(self) -> Path:
        return self.path / "pretraining.pt"

    @property
    def reference(self) -> Path:
        return self.path / "reference"  # Hugging Face folder: the policy's start

    @property
    def reward_model(self) -> Path:
        return self.path / "reward_model.pt"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def audit(self) -> Path:
        return self.path / "audit.jsonl"

    @property
    def drift(self) -> Path:
        return self.path / "drift.json"  # where the last rollout's KL sits

    @property
    def table(self) -> Path:
        return self.path / "table.txt"

    @property
    def picture(self) -> Path:
        return self.path / "curves.png"

    @property
    def policy(self) -> Path:
        return self.path / "policy"  # Hugging Face folder: the trained policy


def create_run(path: Path, config: PPOConfig) -> RunFolder:
    """Make a new run folder that holds `config`.

    Raises:
        ValueError: the folder exists and is not empty, or cannot be written.
    """
    try:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ValueError(
                f"out is '{path}', which already exists; choose another folder, "
                f"or continue the run in it with --resume {path}"
            )
        run = RunFolder(path)
        make_folder(path)
        write_text(run.config, config.to_json())
    except OSError as error:
        raise ValueError(f"out is '{path}', which cannot be written: {error}") from error
    return run


def open_run(path: Path) -> tuple[RunFolder, PPOConfig]:
    """Open a run folder to continue; returns it and its configuration.

    Raises:
        ValueError: the folder holds no run, one of another version, or links that lead out of it.
    """
    run = RunFolder(path)
    if not run.config.is_file():
        raise ValueError(f"resume is '{path}', which holds no checkpoint of a run (no config.json)")
    check_links("resume", path)
    try:
        return run, PPOConfig.from_json(run.config.read_text(encoding="utf-8"))
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"resume is '{path}', whose config.json is not usable: {error}") from error


def save_state(path: Path, state: dict[str, Any]) -> None:
    write_atomically(path, lambda file: torch.save(state, file))


def load_state(path: Path) -> dict[str, Any]:
    """Load tensors and plain values that `save_state` wrote; no file can run code here.

    Raises:
        ValueError: it holds something else, or is damaged.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"'{path}' is no file of tensors and plain values") from error
    if not isinstance(state, dict):
        raise ValueError(f"'{path}' holds a {type(state).__name__}; it must hold a dict")
    return state


def save_model(
    folder: Path,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Save a Hugging Face folder, complete or absent; an older one of that name is replaced.

    `weights`: in place of the model's own, of which this process may hold a part. All are saved in
    `dtype`, which the folder's config.json names, too.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(FOLDER_MODE)  # not by save_pretrained, which would write through a link
    lm.save_pretrained(partial, state_dict=_cast(weights or lm.state_dict(), dtype))
    lm.config.dtype = dtype  # save_pretrained wrote the dtype of training
    lm.config.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    # All files get the mode that the umask gave config.json; safetensors' are for the user alone.
    mode = (partial / "config.json").stat().st_mode & FILE_MODE
    for file in partial.rglob("*"):  # a tokenizer with several chat templates has a folder of them
        if file.is_dir():
            file.chmod(file.stat().st_mode & FOLDER_MODE)
            continue
        file.chmod(mode)
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
    shutil.rmtree(folder, ignore_errors=True)  # a folder cannot be renamed onto a full one
    os.replace(partial, folder)
    sync_folder(folder.parent)


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay tied, and are saved once
    for weight in weights.values():
        key = weight.data_ptr(), weight.shape
        if key not in cast:
            cast[key] = weight.to(dtype) if weight.is_floating_point() else weight
    return {name: cast[weight.data_ptr(), weight.shape] for name, weight in weights.items()}


def rng_state() -> dict[str, Any]:
    """Read torch's global generators, the only randomness of a run, alike on all its ranks."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])
