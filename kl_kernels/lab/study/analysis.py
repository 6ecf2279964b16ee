"""The numbers of a study's report, computed from the folder of the finished study."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.report import Record, read_metrics
from kl_kernels.lab.study.claims import conclusions
from kl_kernels.lab.study.cost import measure_cost
from kl_kernels.lab.study.estimators import measure_all
from kl_kernels.lab.study.fit import fit_gao
from kl_kernels.lab.study.generations import answers_side_by_side
from kl_kernels.lab.study.outcomes import Outcome, best_beta, curves, outcome, table
from kl_kernels.lab.study.plan import Plan, StudyFolder
from kl_kernels.lab.study.prepare import load_task
from kl_kernels.lab.study.statistics import mean_interval
from kl_kernels.lab.study.tree import compare_forms

Records = Mapping[str, Sequence[Sequence[Record]]]  # by beta, a run per seed


def analyse(plan: Plan, study: StudyFolder) -> dict[str, Any]:
    """Compute everything a report says, as values that JSON can hold."""
    records = {
        beta: [read_metrics(study.run(beta, seed).metrics) for seed in plan.seeds]
        for beta in plan.betas
    }
    config = dataclasses.replace(plan.constants, seed=plan.seeds[0])
    task = load_task(study.start(config.seed), config)
    best = best_beta({beta: list(map(outcome, runs)) for beta, runs in records.items()})
    shown = [beta for beta in plan.betas if beta in ("0", best)]
    return analyse_records(plan.constants, records, measure_all(plan, study, task, config)) | {
        "seeds": list(plan.seeds),
        "cost": measure_cost(config.batch_size, config.answer_tokens, len(task.tokenizer)),
        "gradients": compare_forms(),
        "samples": answers_side_by_side(study, task, config, shown),
    }


def analyse_records(
    constants: PPOConfig, records: Records, estimators: Mapping[str, Any]
) -> dict[str, Any]:
    """The part that comes from metrics alone."""
    outcomes = {beta: list(map(outcome, runs)) for beta, runs in records.items()}
    firsts = next(iter(outcomes.values()))  # runs of a seed start alike
    points, fits = None, None
    if "0" in records:
        points, fits = _overoptimisation(records["0"], outcomes["0"])
    claims = conclusions(outcomes, constants.kl_target, fits, estimators)
    return {
        "constants": dataclasses.asdict(constants),
        "updates": constants.updates,
        "n_seeds": len(firsts),
        "kl_target": constants.kl_target,
        "claims": [dataclasses.asdict(claim) for claim in claims],
        "start": {
            name: dataclasses.asdict(mean_interval([run.start[name] for run in firsts]))
            for name in ("proxy", "gold", "kl", "entropy", "length")
        },
        "table": table(outcomes),
        "best_beta": best_beta(outcomes),
        "overoptimisation": points,
        "fits": fits,
        "runs": {
            beta: [dataclasses.asdict(run) | {"gold_drop": run.gold_drop} for run in runs]
            for beta, runs in outcomes.items()
        },
        "estimators": dict(estimators),
        "curves": {beta: curves(runs) for beta, runs in records.items()},
        "seconds_per_update": fmean(
            r["seconds"] for runs in records.values() for run in runs for r in run
        ),
    }


def _overoptimisation(
    runs: Sequence[Sequence[Record]], outcomes: Sequence[Outcome]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """All updates of all seeds at beta = 0, and Gao's form fitted to them.

    The form starts from 0, so each run's rewards count from its own start.
    """
    flat = [r for run in runs for r in run]
    kl = np.array([max(r["kl"], 0.0) for r in flat])  # rounding can leave -1e-9
    points = {
        "kl": kl.tolist(),
        **{name: [r[name] for r in flat] for name in ("proxy", "gold")},
        "gold_start": fmean(run.start["gold"] for run in outcomes),
        "observed_peak_kl": fmean(run.peak_kl for run in outcomes),
        "observed_peak_gold": fmean(run.gold_peak for run in outcomes),
    }
    if len(np.unique(kl)) < 3:
        return points, None
    fits: dict[str, Any] = {
        "largest_kl": float(kl.max()),
        "observed_peak_kl": points["observed_peak_kl"],
    }
    for name in ("gold", "proxy"):
        risen = np.array([r[name] - run[0][name] for run in runs for r in run])
        fit = fit_gao(kl, risen)
        peak = None if fit.peak is None else fit.peak**2
        fits[name] = dataclasses.asdict(fit) | {"peak_kl": peak}
    return points, fits
