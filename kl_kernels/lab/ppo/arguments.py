"""The arguments of `python -m kl_kernels ppo`, without a run's imports: help needs no extra."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from kl_kernels import extras
from kl_kernels.lab.ppo.config import PPOConfig

# The first constant of each group, in the order of `PPOConfig`, and the group's title.
GROUPS = {
    "model": "model, prompts and reward (without them: a tiny task that is built in)",
    "vocab_size": "the built-in task: its language model",
    "reward_pairs": "the built-in task: its reward model",
    "updates": "rollouts",
    "reference": "the KL penalty and how its weight beta is controlled",
    "score_clip": "from scores to rewards",
    "gamma": "advantages and losses",
    "epochs": "optimisation",
    "target_kl": "limits, monitoring and logging",
}
LITERATURE = """
[GAE] Schulman et al. (2016), High-dimensional continuous control using generalized advantage
estimation. [PPO] Schulman et al. (2017), Proximal policy optimization algorithms. [Ziegler] Ziegler
et al. (2019), Fine-tuning language models from human preferences. [37 details] Huang et al. (2022),
The 37 implementation details of proximal policy optimization. [GRPO] Shao et al. (2024),
DeepSeekMath. [DAPO] Yu et al. (2025), DAPO: an open-source LLM reinforcement learning system.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    run = parser.add_argument_group("the run")
    run.add_argument("--out", metavar="DIR", help="new run folder (default: runs/ppo-<time>)")
    run.add_argument("--resume", metavar="DIR", help="continue the run in this folder")
    add_constants(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit status.

    Raises:
        ValueError: an argument is wrong, or a package is not installed.
    """
    extras.need("ppo", *extras.of_extra("ppo"))
    from kl_kernels.lab.ppo import command

    return command.run(args)


def add_constants(parser: argparse.ArgumentParser) -> None:
    """Add an option per field of `PPOConfig`; the namespace holds those that are given.

    Ranges and choices are left to `PPOConfig`, so that each is checked, and put in words, once.
    """
    parser.usage = "%(prog)s [options]"  # a list of all options would fill a screen
    parser.epilog = LITERATURE
    group: Any = parser
    for f in dataclasses.fields(PPOConfig):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        default = "" if f.default == "" else f" (default: {f.default})"
        form: dict[str, Any] = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(f.default, bool)
            else {"type": type(f.default), "metavar": f.metadata["metavar"]}
        )
        group.add_argument(
            "--" + f.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f.metadata["reason"] + default,
            **form,
        )
