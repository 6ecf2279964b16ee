"""The command, and the loop itself, with constants so small that a run takes a second."""

import argparse
import dataclasses
from pathlib import Path

from kl_kernels.lab.ppo import command, loop
from kl_kernels.lab.ppo.arguments import add_arguments
from kl_kernels.lab.ppo.checkpoint import RunFolder, create_run
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.report import read_metrics

MICRO = [
    *("--batch-size", "8", "--minibatches", "2", "--answer-tokens", "6", "--prompt-tokens", "3"),
    *("--reward-pairs", "12", "--reward-epochs", "1", "--kl-horizon", "16"),
]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def run(*arguments: str | Path) -> int:
    return command.run(parse(*map(str, arguments)))


CONFIG = PPOConfig(**{k: v for k, v in vars(parse(*MICRO)).items() if k not in ("out", "resume")})
PROMPTS = [[4], [7, 8, 9], [11, 12]]


def vowels(prompts, answers):
    return [sum(letter in "aeiou" for letter in answer) / 4 for answer in answers]


def train(folder, model_folder, *, reward=vowels, **changes):
    """Start a run in `folder`, or go on there; returns its metrics, but for the time it took."""
    config = dataclasses.replace(CONFIG, **changes)
    run = RunFolder(folder) if folder.exists() else create_run(folder, config)
    lm, tokenizer = load_model(model_folder)
    loop.train(config, run, lm, tokenizer, PROMPTS, reward, None)
    records = read_metrics(run.metrics)
    assert all(record.pop("seconds") > 0 for record in records)
    return records
