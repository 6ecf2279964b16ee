"""False alarms of the sampling gap, and mistakes found by it: `bench/results/sampling_gap.json`.

The language is exact: a table of the next letter after three letters of English, from the text that
every Python carries. False alarms are counted on its own samples, and on the hardest distributions
there are: one token likely, and the rest spread so thin that a batch may hold none of it.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import pydoc_data.topics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.machine import record
from kl_kernels.monitor import KLMonitor, Limits
from kl_kernels.monitor.sampling_gap import NonzeroGap
from kl_kernels.rl.sampling import GapSums

RESULTS = Path(__file__).parents[1] / "results" / "sampling_gap.json"
STEPS = 600
SEED = 2024
SHAPES = {160: (8, 20), 2048: (64, 32), 16384: (512, 32)}  # tokens: answers of so many
LETTERS = "abcdefghijklmnopqrstuvwxyz .,\0"  # the last one stands for all others
RARE, TOKENS = 150_000, (26, 64, 160, 640, 2048, 16384)

Array = np.ndarray[Any, Any]


class Language:
    """Letters, each after the three before it; a state is those three."""

    v = len(LETTERS)

    def __init__(self) -> None:
        topics = pydoc_data.topics.topics
        text = "".join(topics[name] for name in sorted(topics)).lower()
        self.text = np.array([LETTERS.find(letter) for letter in text]) % self.v
        # Counts of each context, with three more spread as the shorter context has it.
        table = (np.bincount(self.text, minlength=self.v) + 0.5)[None]
        table = table / table.sum()
        for order in (1, 2, 3):
            counts = np.zeros((self.v**order, self.v))
            np.add.at(counts, (self.states(order)[: len(self.text) - order], self.text[order:]), 1)
            counts += 3 * (np.tile(table, (self.v, 1)) if order > 1 else table)
            table = counts / counts.sum(1, keepdims=True)
        self.log_p = np.log(table)
        self.entropy = -(table * self.log_p).sum(1)

    def states(self, order: int = 3) -> Array:
        windows = np.lib.stride_tricks.sliding_window_view(self.text, order)
        return windows @ self.v ** np.arange(order)[::-1]

    def sampler(self, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> Array:
        """Cumulative probabilities of what is sampled, [states, letters]."""
        p = np.exp(self.log_p / temperature)
        p /= p.sum(1, keepdims=True)
        order = np.argsort(-p, 1)
        ordered = np.take_along_axis(p, order, 1)
        kept = np.cumsum(ordered, 1) - ordered < top_p
        kept[:, top_k or self.v :] = False
        np.put_along_axis(p, order, ordered * kept, 1)
        cumulative = np.cumsum(p, 1)
        return cumulative / cumulative[:, -1:]

    def sample(
        self, rng: np.random.Generator, cumulative: Array, n: int, length: int
    ) -> tuple[Array, Array]:
        """Letters [n, length + 1], and the state before each and behind the last."""
        state = self.states()[rng.integers(0, len(self.text) - 2, n)]
        letters, states = np.zeros((n, length), np.int64), np.zeros((n, length + 1), np.int64)
        states[:, 0] = state
        for t in range(length):
            u = rng.random((n, 1))
            letters[:, t] = np.minimum((cumulative[state] < u).sum(1), self.v - 1)
            state = state % self.v**2 * self.v + letters[:, t]
            states[:, t + 1] = state
        return letters, states


@functools.cache
def language() -> Language:
    return Language()


# Each mistake: how tokens are sampled, how late the states are, whether letters are renumbered.
MISTAKES: dict[str, tuple[dict[str, Any], int, bool]] = {
    "logits one position late (`logits[:, prompt:]`)": ({}, 1, False),
    "logits one position early": ({}, -1, False),
    "ids of another tokenizer": ({}, 0, True),
    "sampled at temperature 1.2, scored at 1": ({"temperature": 1.2}, 0, False),
    "sampled at temperature 0.9, scored at 1": ({"temperature": 0.9}, 0, False),
    "sampled at temperature 0.7, scored at 1": ({"temperature": 0.7}, 0, False),
    "top-p 0.95 in sampling alone": ({"top_p": 0.95}, 0, False),
    "top-p 0.9 in sampling alone": ({"top_p": 0.9}, 0, False),
    "top-k 5 of 30 in sampling alone": ({"top_k": 5}, 0, False),
}


def batches(
    mistake: str | None, shape: tuple[int, int], n: int, seed: tuple[int, ...]
) -> Iterator[dict[str, torch.Tensor]]:
    """Log-probabilities and entropies of `n` batches."""
    rng = np.random.default_rng(seed)
    sampling, late, renumbered = MISTAKES[mistake] if mistake else ({}, 0, False)
    rows, length = shape
    of = language()
    letters, states = of.sample(rng, of.sampler(**sampling), n * rows, length + 1)
    if renumbered:
        letters = np.random.default_rng(SEED).permutation(of.v)[letters]
    letters, states = letters[:, 1:], states[:, 1 + late : length + 1 + late]
    logprob, entropy = of.log_p[states, letters], of.entropy[states]
    for i in range(n):
        own = slice(i * rows, (i + 1) * rows)
        yield {"logprob": torch.tensor(logprob[own]), "entropy": torch.tensor(entropy[own])}


def told(monitor: KLMonitor, step: int, batch: dict[str, torch.Tensor]) -> bool:
    mask = torch.ones(batch["logprob"].shape, dtype=torch.bool)
    return bool(monitor.observe(step, kl=0.0, mask=mask, **batch))


def run_of_language(task: tuple[int, int]) -> int:
    """Alarms on a run of right batches."""
    tokens, number = task
    monitor = KLMonitor()
    right = batches(None, SHAPES[tokens], STEPS, (SEED, tokens, number))
    return sum(told(monitor, step, batch) for step, batch in enumerate(right))


def sums_of(n: int, rare: Array, eps: float) -> list[GapSums]:
    """Yield each number of rare ones among n tokens; RARE tokens share a probability of eps."""
    costs = -math.log1p(-eps), -math.log(eps / RARE)
    entropy = (1 - eps) * costs[0] + eps * costs[1]
    a, b = costs[0] - entropy, costs[1] - entropy
    return [
        GapSums(n, (n - k) * a + k * b, (n - k) * a * a + k * b * b, n * entropy)
        for k in rare.tolist()
    ]


def detector() -> NonzeroGap:
    return NonzeroGap(Limits().sampling_gap, Limits().sampling_gap_nats)


def worst_of_rare() -> dict[str, float]:
    """The largest probability that one right batch alarms, by enumeration."""
    worst = {"probability": 0.0}
    for n in TOKENS:
        k = np.arange(n + 1)
        log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
        choices = log_factorials[n] - log_factorials - log_factorials[::-1]
        for eps in np.geomspace(1e-4, 0.5, 24).tolist():
            p = np.exp(choices + k * math.log(eps) + (n - k) * math.log1p(-eps))
            alarms = [detector().observe_sums(0, sums) is not None for sums in sums_of(n, k, eps)]
            if (found := float(p[alarms].sum())) > worst["probability"]:
                worst = {"probability": found, "eps": eps, "tokens": n}
    return worst


def runs_of_rare(worst: dict[str, float], n_runs: int) -> int:
    """Alarms on runs of what is worst for one batch."""
    rng = np.random.default_rng(SEED)
    n, eps = int(worst["tokens"]), worst["eps"]
    alarms = 0
    for _ in range(n_runs):
        watching, rare = detector(), rng.binomial(n, eps, STEPS)
        alarms += sum(watching.observe_sums(0, s) is not None for s in sums_of(n, rare, eps))
    return alarms


def found(task: tuple[str, int]) -> dict[str, Any]:
    """Measure a mistake's gap, and the steps until it is reported."""
    mistake, n_batches = task
    seed = SEED, list(MISTAKES).index(mistake)
    large = next(batches(mistake, (20_000, 32), 1, (*seed, 0)))
    terms = -large["logprob"] - large["entropy"]
    shares = {}
    for tokens, shape in SHAPES.items():
        each = batches(mistake, shape, n_batches, (*seed, tokens))
        shares[str(tokens)] = float(np.mean([told(KLMonitor(), 1, batch) for batch in each]))
    waits = []
    for i in range(n_batches // 10):
        monitor, last = KLMonitor(), 100
        each = enumerate(batches(mistake, SHAPES[2048], last, (*seed, 1, i)), 1)
        waits.append(next((step for step, batch in each if told(monitor, step, batch)), math.inf))
    median = float(np.median(waits))
    return {
        "mistake": mistake,
        "gap": float(terms.mean()),
        "error": float(terms.square().sum().sqrt() / terms.numel()),
        "found": shares,
        "median_batches": median if median < math.inf else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40, help="of right batches (default: 40)")
    parser.add_argument("--batches", type=int, default=100, help="per mistake (default: 100)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = record() | {"steps": STEPS, "false_alarms": []}
    results["letters"] = Language.v
    results["entropy"] = float(next(batches(None, (20_000, 32), 1, (SEED, 0)))["entropy"].mean())
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for tokens in (160, 2048):
            alarms = sum(pool.map(run_of_language, [(tokens, i) for i in range(args.runs)]))
            results["false_alarms"].append({"tokens": tokens, "runs": args.runs, "alarms": alarms})
        results["found"] = pool.map(found, [(m, args.batches) for m in MISTAKES], chunksize=1)
    results["worst"] = worst = worst_of_rare()
    n_runs = 50 * args.runs
    results["worst_runs"] = {"runs": n_runs, "alarms": runs_of_rare(worst, n_runs)}
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
