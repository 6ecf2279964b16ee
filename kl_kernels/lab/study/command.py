"""`python -m kl_kernels study`: from arguments to a study folder and its report."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path

from transformers.utils import logging as transformers_logging

from kl_kernels.lab.ppo.command import INTERRUPTED, Inputs
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.study.plan import Plan, StudyFolder, create_study, open_study
from kl_kernels.lab.study.report import write_report
from kl_kernels.lab.study.runs import ChildFailed, n_cores, run_all


def run(args: argparse.Namespace) -> int:
    """Run the study, and return the exit status.

    Raises:
        ValueError: an argument is wrong; found out before anything is written or takes time.
    """
    return conduct(args)[0]


def conduct(args: argparse.Namespace) -> tuple[int, StudyFolder]:
    """Run the study, and return the exit status and the study's folder."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    jobs = n_cores() if args.jobs is None else args.jobs
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; it must be at least 1")
    plan, study = _planned(args)
    print(f"study folder: {study.path}", flush=True)
    try:
        run_all(plan, study, jobs)
        print(write_report(plan, study))
    except KeyboardInterrupt:
        print(f"\ninterrupted; continue with {_resume(study)}", flush=True)
        return INTERRUPTED, study
    except ChildFailed as error:
        print(f"error: {error}\nonce that is mended: {_resume(study)}", file=sys.stderr)
        return 1, study
    return 0, study


def _resume(study: StudyFolder) -> str:
    return f"python -m kl_kernels study --resume {study.path}"


def _planned(args: argparse.Namespace) -> tuple[Plan, StudyFolder]:
    names = {field.name for field in dataclasses.fields(PPOConfig)}
    constants = {name: value for name, value in vars(args).items() if name in names}
    given = {
        name: value
        for name, value in {
            "betas": args.betas and tuple(args.betas.split(",")),
            "n_seeds": args.seeds,
            "n_sequences": args.sequences,
        }.items()
        if value is not None
    }
    if args.resume:
        study, plan = open_study(Path(args.resume))
        changed = dataclasses.replace(
            plan, **given, constants=dataclasses.replace(plan.constants, **constants)
        )
        if args.out or changed != plan:
            raise ValueError(
                "resume continues a study as it was planned; only jobs may be given anew beside it"
            )
        return plan, study
    plan = Plan(PPOConfig(**constants), **given)
    inputs = Inputs(plan.constants)  # refuses what cannot be read, before a folder is made
    for hint in inputs.hints():
        print(hint)
    default = Path("runs") / time.strftime("study-%Y%m%d-%H%M%S")
    return plan, create_study(Path(args.out) if args.out else default, plan)
