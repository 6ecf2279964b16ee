"""`python -m kl_kernels ppo`: from arguments to a run folder."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from kl_kernels.files import write_text
from kl_kernels.lab.ppo.checkpoint import (
    RunFolder,
    create_run,
    load_state,
    open_run,
    save_model,
    save_state,
)
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.loop import train
from kl_kernels.lab.ppo.model import (
    check_model_folder,
    kept_dtype,
    load_model,
    said_of_dtypes,
    weights_dtypes,
)
from kl_kernels.lab.ppo.pretrain import pretrain, train_tokenizer
from kl_kernels.lab.ppo.prompts import HINT, encode_prompts, read_prompts
from kl_kernels.lab.ppo.ranks import Ranks, launch
from kl_kernels.lab.ppo.reference import check_peft
from kl_kernels.lab.ppo.report import draw, read_metrics, summary, table
from kl_kernels.lab.ppo.reward import RewardFunction, TokenReward, fit_reward_model, load_reward
from kl_kernels.lab.ppo.task import GoldScore, load_corpus
from kl_kernels.lab.ppo.watch import check_library

INTERRUPTED = 130  # the shell's status for a process ended by Ctrl-C


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit status.

    Raises:
        ValueError: an argument is wrong; found out before anything is written or takes time.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    _, ranks = launch()
    try:
        status = _run(args, ranks)
    except ValueError:
        ranks.leave()
        if ranks.first:
            raise
        return 2  # said once is enough
    ranks.leave()
    return status


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    config, folder, inputs = _prepared(args, ranks)
    if ranks.first:
        print(f"run folder: {folder.path}", *inputs.hints(), sep="\n")
    try:
        _train(config, folder, inputs, ranks)
    except KeyboardInterrupt:
        if ranks.first:
            print(f"\ninterrupted; continue with --resume {folder.path}", flush=True)
        return INTERRUPTED
    ranks.wait()
    return 0


def _prepared(args: argparse.Namespace, ranks: Ranks) -> tuple[PPOConfig, RunFolder, Inputs]:
    """Everything checked, and then the run folder."""
    names = {field.name for field in dataclasses.fields(PPOConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.resume:
        folder, config = _resumed(Path(args.resume), args.out, given)
        ranks.check(config)
        inputs = Inputs(config)
        if given:
            ranks.on_first(lambda: write_text(folder.config, config.to_json()))
        return config, folder, inputs
    config = PPOConfig(**given)
    ranks.check(config)
    inputs = Inputs(config)
    default = Path("runs") / time.strftime("ppo-%Y%m%d-%H%M%S")
    out = Path(args.out) if args.out else default
    return config, ranks.on_first(lambda: create_run(out, config)), inputs


class Inputs:
    """What the arguments name, loaded as far as that is quick, so that errors come at once."""

    def __init__(self, config: PPOConfig) -> None:
        check_library(config.log_to)
        if config.reference == "adapter":
            check_peft()
        self.reward = load_reward(config.reward) if config.reward else None
        self.prompts = read_prompts(config.prompts) if config.prompts else None
        if config.model:
            check_model_folder(config.model)
        needs_corpus = not (config.model and config.prompts and config.reward)
        self.paragraphs = load_corpus() if needs_corpus else []
        self.lm = load_model(config.model) if config.model else None
        self.dtypes = weights_dtypes(config.model) if config.model else [torch.float32]
        # A model that is yet to be pretrained will have this tokenizer.
        tokenizer = self.lm[1] if self.lm else train_tokenizer(self.paragraphs, config.vocab_size)
        self.encode(config, tokenizer)

    def encode(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """The tokens of every prompt; ValueError if one cannot be answered."""
        context: int | None = config.context
        if self.lm:
            model = self.lm[0].config.get_text_config()
            context = getattr(model, "max_position_embeddings", None)
        return encode_prompts(config, self.prompts, self.paragraphs, tokenizer, context)

    def hints(self) -> list[str]:
        """Notes on the given model that its user should read before it is trained."""
        if self.lm is None:
            return []
        is_text = self.prompts is None or isinstance(self.prompts[0], str)
        chat = HINT if is_text and self.lm[1].chat_template else None
        return [hint for hint in (said_of_dtypes(self.dtypes), chat) if hint]


def _resumed(path: Path, out: str | None, given: dict[str, object]) -> tuple[RunFolder, PPOConfig]:
    folder, config = open_run(path)
    if out or given.keys() - {"updates"}:
        raise ValueError(
            "resume continues a run with its own constants; only updates may be given beside it"
        )
    if given:
        config = dataclasses.replace(config, **given)  # type: ignore[arg-type]
        done = load_state(folder.checkpoint)["updates"] if folder.checkpoint.is_file() else 0
        if config.updates < done:
            raise ValueError(
                f"updates is {config.updates}, but the run in '{path}' has done {done}; it must be "
                "at least that"
            )
    return folder, config


class Task(NamedTuple):
    """What a run trains, on what, towards what."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    reward: RewardFunction
    gold: GoldScore | None  # what a given reward is a proxy of, nobody knows


def prepare(config: PPOConfig, folder: RunFolder, inputs: Inputs, ranks: Ranks) -> Task:
    """The task, and in the folder what it is made of; what the folder has is not made again."""
    if inputs.lm is None:
        if not ranks.on_first(folder.reference.is_dir):
            ranks.on_first(lambda: pretrain(config, inputs.paragraphs, folder))
        lm, tokenizer = load_model(folder.reference)
    else:
        lm, tokenizer = inputs.lm
    if torch.cuda.is_available():
        lm = lm.cuda()

    prompts = inputs.encode(config, tokenizer)
    if inputs.reward:
        return Task(lm, tokenizer, prompts, inputs.reward, None)
    gold = GoldScore.of_corpus(inputs.paragraphs)
    ranks.on_first(lambda: _fit_reward(config, folder, lm, tokenizer, prompts, gold))
    reward = TokenReward(tokenizer)
    reward.load_state_dict(load_state(folder.reward_model))
    return Task(lm, tokenizer, prompts, reward, gold)


def _train(config: PPOConfig, folder: RunFolder, inputs: Inputs, ranks: Ranks) -> None:
    task = prepare(config, folder, inputs, ranks)
    lm, weights = train(config, folder, *task)
    if ranks.first:
        save_model(folder.policy, lm, task.tokenizer, weights, kept_dtype(inputs.dtypes))
        _report(config, folder)


def _report(config: PPOConfig, folder: RunFolder) -> None:
    records = read_metrics(folder.metrics)
    drift = json.loads(folder.drift.read_text(encoding="utf-8"))
    draw(folder.picture, config, records)
    report = f"{table(records)}\n\n{summary(config, records, drift)}\n"
    write_text(folder.table, report)
    print(f"\n{report}")
    print(f"metrics: {folder.metrics}\naudit:   {folder.audit}")
    print(f"picture: {folder.picture}\npolicy:  {folder.policy}")


def _fit_reward(
    config: PPOConfig,
    folder: RunFolder,
    lm: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    gold: GoldScore,
) -> None:
    """Once per run: the run folder keeps it."""
    if folder.reward_model.is_file():
        return
    torch.manual_seed(config.seed)
    reward = fit_reward_model(config, lm, tokenizer, prompts, gold)
    save_state(folder.reward_model, reward.state_dict())
