"""False alarms and delays of `KLMonitor`'s defaults: `bench/results/monitor.json`.

Series are simulated: x_t = level + phi (x_{t-1} - level) + e_t, from the stationary distribution
on. Every figure comes from the monitor itself, one observation at a time, but one: what a test
would find that knows level, phi and sd. About a minute and a half on two cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from bench.common.machine import record
from kl_kernels.monitor import KLMonitor

RESULTS = Path(__file__).parents[1] / "results" / "monitor.json"
STEPS = 600
SEED = 2024
LEVELS, SDS = (0.0, 1.0, 5.0, 20.0), (0.01, 0.1, 1.0)
INPUTS = {"entropy": 2.0, "ratio": 1.0, "reward": 0.0, "grad_norm": 1.0, "kl_coef": 0.1}
CHUNK = 25  # runs per piece of work


@dataclass(frozen=True)
class Job:
    """Many runs of one kind of series."""

    name: str
    phi: float
    stationary: bool = False  # whether sd is that of the series, not of the noise that drives it
    sd: float | None = None  # None: SDS and LEVELS in turn
    level: float | None = None
    all_inputs: bool = False
    change: float = 0.0
    change_at: int = STEPS
    after: int = 0  # steps from the change on
    share: float = 1.0  # part of the runs asked for


def ar1(rng: np.random.Generator, n: int, phi: float, sd: float) -> np.ndarray:
    """Noise around 0 whose driving noise has this sd."""
    x = rng.normal(0, sd, n)
    x[0] /= np.sqrt(1 - phi * phi)
    for t in range(1, n):
        x[t] += phi * x[t - 1]
    return x


def run(job: Job, seed: tuple[int, ...]) -> list[tuple[int, str]]:
    """Steps and kinds of the events of one run."""
    rng = np.random.default_rng(seed)
    run_number = seed[-1]
    sd = SDS[run_number % 3] if job.sd is None else job.sd
    level = LEVELS[run_number // 3 % 4] if job.level is None else job.level
    driving = sd * (np.sqrt(1 - job.phi**2) if job.stationary else 1.0)
    n = job.change_at + job.after
    kl = level + ar1(rng, n, job.phi, driving)
    kl[job.change_at :] += job.change
    inputs = {"kl": kl}
    if job.all_inputs:
        inputs |= {name: x + ar1(rng, n, job.phi, 0.08) for name, x in INPUTS.items()}
    monitor = KLMonitor(kl_budget=1e3)
    series = {name: values.tolist() for name, values in inputs.items()}
    events = []
    for t in range(n):
        observed = {name: values[t] for name, values in series.items()}
        events += [(t, event.kind) for event in monitor.observe(t + 1, **observed)]
    return events


def chunk(task: tuple[int, Job, int, int]) -> tuple[int, list[list[tuple[int, str]]]]:
    number, job, first, last = task
    return number, [run(job, (SEED, number, i)) for i in range(first, last)]


def rate(count: float, runs: int) -> dict[str, float]:
    """A rate per run with its Monte Carlo error, that of a Poisson count."""
    return {"rate": count / runs, "error": max(count, 1) ** 0.5 / runs}


def false_alarms(job: Job, runs: list[list[tuple[int, str]]]) -> dict[str, Any]:
    kinds = Counter(kind for events in runs for _, kind in events)
    result = {"name": job.name, "phi": job.phi, "runs": len(runs)}
    result |= rate(sum(kinds.values()), len(runs))
    return result | {"kinds": {kind: n / len(runs) for kind, n in sorted(kinds.items())}}


def found(job: Job, runs: list[list[tuple[int, str]]]) -> dict[str, Any]:
    """Delays count observations: 1 is the very step of the change."""
    at = job.change_at
    later = [
        [t for t, kind in events if t >= at and kind in ("kl_jump", "kl_drift")] for events in runs
    ]
    delays = np.array([times[0] - at + 1 if times else np.inf for times in later])
    n = len(runs)
    within = {str(d): float(np.mean(delays <= d)) for d in (1, 5, 10, 14, 20)}
    return {
        "name": job.name,
        "change_at": at,
        "runs": n,
        "within": within,
        "error": {d: (max(p * (1 - p), 1 / n) / n) ** 0.5 for d, p in within.items()},
        "median_delay": float(np.median(delays)),
        "steps_after": job.after,
        "alarms_after": float(np.mean([len(times) for times in later])),
    }


def known_parameters(rng: np.random.Generator, false_alarm_rate: float) -> dict[str, float]:
    """Found within 14 steps by a CUSUM that is told the noise and the shift, +3 sd: a bound.

    One-sided, with the limit at which this part of runs of STEPS gives a false alarm. There is no
    test with fewer false alarms and a smaller worst-case delay (Moustakides 1986).
    """
    phi, shift, n_runs, last = 0.6, 3.0, 20000, 14

    def largest(residuals: np.ndarray) -> np.ndarray:  # [runs, steps] -> [runs]
        first, later = shift, shift * (1 - phi)  # the shift in the residuals
        statistic = np.full(len(residuals), -np.inf)
        maximum = statistic
        for e in residuals.T:
            goes_on = statistic + later * (e - later / 2)
            statistic = np.maximum(goes_on, first * (e - first / 2))
            maximum = np.maximum(maximum, statistic)
        return maximum

    limit = np.quantile(largest(rng.normal(size=(n_runs, STEPS))), 1 - false_alarm_rate)
    carried = np.full(last, shift * (1 - phi))
    carried[0] = shift
    within = float(np.mean(largest(carried + rng.normal(size=(n_runs, last))) > limit))
    return {
        "false_alarm_rate": false_alarm_rate,
        "within_14": within,
        "error": (within * (1 - within) / n_runs) ** 0.5,
    }


def jobs() -> list[Job]:
    nulls = [Job("KL alone", phi) for phi in (0.0, 0.3, 0.6, 0.8)]
    nulls += [Job("all inputs", 0.6, all_inputs=True, share=0.5)]
    changes = []
    for name, change, stationary in (
        ("+2.0", 2.0, False),
        ("+0.3, sd 0.1 of the series", 0.3, True),
        ("+0.3, sd 0.1 of the noise that drives it", 0.3, False),
    ):
        for at in (64, 100, 150, 300):
            after = 100 if at == 150 else 20
            job = Job(
                name, 0.6, stationary, 0.1, 5.0, change=change, change_at=at, after=after, share=0.5
            )
            changes.append(job)
    return nulls + changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=800, help="per series (default: 800)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = record() | {"steps": STEPS, "false_alarms": [], "found": []}
    work = jobs()
    tasks = []
    for number, job in enumerate(work):
        n = int(args.runs * job.share)
        tasks += [(number, job, i, min(i + CHUNK, n)) for i in range(0, n, CHUNK)]
    runs: dict[int, list[list[tuple[int, str]]]] = {number: [] for number in range(len(work))}
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for number, events in tqdm(pool.imap_unordered(chunk, tasks), total=len(tasks)):
            runs[number] += events
    for number, job in enumerate(work):
        summary = found if job.after else false_alarms
        results[summary.__name__].append(summary(job, runs[number]))
    drift = results["false_alarms"][2]["kinds"]["kl_drift"]
    results["known_parameters"] = known_parameters(np.random.default_rng(SEED), drift)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
