"""The command with constants so small that a run takes a second."""

import argparse
from pathlib import Path

from kl_kernels.ppo import command

MICRO = [
    *("--batch-size", "8", "--minibatches", "2", "--answer-tokens", "6", "--prompt-tokens", "3"),
    *("--reward-pairs", "12", "--reward-epochs", "1", "--kl-horizon", "16"),
]


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


def run(*arguments: str | Path) -> int:
    return command.run(parse(*map(str, arguments)))
