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
    dtype_note,
    load_model,
    saved_dtype,
    weights_dtypes,
)
from kl_kernels.lab.ppo.pretrain import PretrainConstants, pretrain, train_tokenizer
from kl_kernels.lab.ppo.prompts import HINT, encode_prompts, paragraph_starts, read_prompts
from kl_kernels.lab.ppo.ranks import Ranks, launch
from kl_kernels.lab.ppo.ref_model import check_peft
from kl_kernels.lab.ppo.report import draw, read_metrics, summary, table
from kl_kernels.lab.ppo.reward import (
    RewardFunction,
    RewardModelConstants,
    TokenReward,
    fit_reward_model,
    load_reward,
)
from kl_kernels.lab.ppo.run_logger import check_library
from kl_kernels.lab.ppo.task import GoldScore, load_corpus

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
        ranks.shut_down()
        if ranks.is_main:
            raise
        return 2  # the main rank prints the error
    ranks.shut_down()
    return status


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    config, folder, inputs = _prepare_run(args, ranks)
    if ranks.is_main:
        print(f"run folder: {folder.path}", *inputs.hints(), sep="\n")
    try:
        _train(config, folder, inputs, ranks)
    except KeyboardInterrupt:
        if ranks.is_main:
            print(f"\ninterrupted; continue with --resume {folder.path}", flush=True)
        return INTERRUPTED
    ranks.barrier()
    return 0


def _prepare_run(args: argparse.Namespace, ranks: Ranks) -> tuple[PPOConfig, RunFolder, Inputs]:
    """Check everything, and then make the run folder, or open it."""
    names = {field.name for field in dataclasses.fields(PPOConfig)}
    given = {name: value for name, value in vars(args).items() if name in names}
    if args.resume:
        folder, config = _open_resumed(Path(args.resume), args.out, given)
        ranks.check_batch_size(config.batch_size, config.minibatches)
        inputs = Inputs(config)
        if given:
            ranks.on_main(lambda: write_text(folder.config, config.to_json()))
        return config, folder, inputs
    config = PPOConfig(**given)
    ranks.check_batch_size(config.batch_size, config.minibatches)
    inputs = Inputs(config)
    default = Path("runs") / time.strftime("ppo-%Y%m%d-%H%M%S")
    out = Path(args.out) if args.out else default
    return config, ranks.on_main(lambda: create_run(out, config)), inputs


class Inputs:
    """Loads the files that arguments name, as far as that is quick, so that errors come at once."""

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
        # Pretraining will give the model this tokenizer.
        tokenizer = self.lm[1] if self.lm else train_tokenizer(self.paragraphs, config.vocab_size)
        self.encode(config, tokenizer)

    def encode(self, config: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Encode every prompt.

        Raises:
            ValueError: one cannot be answered.
        """
        context: int | None = config.context
        if self.lm:
            model = self.lm[0].config.get_text_config()
            context = getattr(model, "max_position_embeddings", None)
        if self.prompts is None:
            return paragraph_starts(
                self.paragraphs,
                tokenizer,
                context=context,
                prompt_tokens=config.prompt_tokens,
                answer_tokens=config.answer_tokens,
            )
        return encode_prompts(
            self.prompts,
            tokenizer,
            path=config.prompts,
            context=context,
            answer_tokens=config.answer_tokens,
        )

    def hints(self) -> list[str]:
        """Collect notes on the given model that its user should read before it is trained."""
        if self.lm is None:
            return []
        is_text = self.prompts is None or isinstance(self.prompts[0], str)
        chat = HINT if is_text and self.lm[1].chat_template else None
        return [hint for hint in (dtype_note(self.dtypes), chat) if hint]


def _open_resumed(
    path: Path, out: str | None, given: dict[str, object]
) -> tuple[RunFolder, PPOConfig]:
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
    """The task of a run: the model, its prompts, and the reward to raise."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    reward: RewardFunction
    gold: GoldScore | None  # None: the user gave the reward, and only it is known


def prepare(config: PPOConfig, folder: RunFolder, inputs: Inputs, ranks: Ranks) -> Task:
    """Make the task, and its models in the folder; those that the folder has are kept."""
    if inputs.lm is None:
        if not ranks.on_main(folder.reference.is_dir):
            constants = config.subset(PretrainConstants)
            ranks.on_main(lambda: pretrain(constants, inputs.paragraphs, folder))
        lm, tokenizer = load_model(folder.reference)
    else:
        lm, tokenizer = inputs.lm
    if torch.cuda.is_available():
        lm = lm.cuda()

    prompts = inputs.encode(config, tokenizer)
    if inputs.reward:
        return Task(lm, tokenizer, prompts, inputs.reward, None)
    gold = GoldScore.of_corpus(inputs.paragraphs)
    ranks.on_main(lambda: _fit_reward(config, folder, lm, tokenizer, prompts, gold))
    reward = TokenReward(tokenizer)
    reward.load_state_dict(load_state(folder.reward_model))
    return Task(lm, tokenizer, prompts, reward, gold)


def _train(config: PPOConfig, folder: RunFolder, inputs: Inputs, ranks: Ranks) -> None:
    task = prepare(config, folder, inputs, ranks)
    lm, weights = train(config, folder, *task)
    if ranks.is_main:
        save_model(folder.policy, lm, task.tokenizer, weights, saved_dtype(inputs.dtypes))
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
    """Fit the reward model, unless the run folder has it."""
    if folder.reward_model.is_file():
        return
    torch.manual_seed(config.seed)
    reward = fit_reward_model(lm, tokenizer, prompts, gold, config.subset(RewardModelConstants))
    save_state(folder.reward_model, reward.state_dict())
