"""The arguments of `python -m kl_kernels study`, without the imports that a study needs."""

from __future__ import annotations

import argparse

from kl_kernels import extras
from kl_kernels.lab.ppo.arguments import add_constants
from kl_kernels.lab.study.plan import BETAS, N_SEEDS, N_SEQUENCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    study = parser.add_argument_group("the study")
    study.add_argument("--out", metavar="DIR", help="new folder (default: runs/study-<time>)")
    study.add_argument(
        "--resume", metavar="DIR", help="run what the study in this folder lacks, and report"
    )
    study.add_argument(
        "--betas",
        metavar="LIST",
        help="weights of the KL penalty, separated by commas; adaptive: the controller sets it "
        f"(default: {','.join(BETAS)})",
    )
    study.add_argument(
        "--seeds", type=int, metavar="N", help=f"runs with each beta (default: {N_SEEDS})"
    )
    study.add_argument(
        "--jobs", type=int, metavar="N", help="runs at the same time (default: one per core)"
    )
    study.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help="answers sampled from each trained policy to compare estimators of the KL "
        f"(default: {N_SEQUENCES})",
    )
    add_constants(parser)


def run(args: argparse.Namespace) -> int:
    """Run the study, and return the exit status.

    Raises:
        ValueError: an argument is wrong, or a package is not installed.
    """
    extras.need("study", *extras.of_extra("ppo"))
    from kl_kernels.lab.study import command

    return command.run(args)
