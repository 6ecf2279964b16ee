"""Linear heads without logits, beside the products alone and in how much memory.

The bare contender multiplies the very tiles that `linear_token_stats` and `linear_token_kl` plan,
from float32 factors, and does nothing else: forward one product per tile and head, backward those
again and two more per tile of the policy. Contenders take turns, and a ratio is the median over
turns of what they took in the same turn, by the clock and in processor time. Memory is the peak of
resident memory in a process of its own, on top of inputs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import kl_kernels
from bench.common.machine import PeakMemory, record
from kl_kernels.functional.hidden_arguments import MEMORY_BUDGETS
from kl_kernels.partitioned.tiles import Head, bytes_of, plan_tiles

ROOT = Path(__file__).parents[2]

JOBS = ("stats", "stats+backward", "kl", "kl+backward")


@dataclass(frozen=True)
class Shape:
    rows: int
    vocab_size: int
    width: int
    dtype: str

    @property
    def logits_bytes(self) -> int:
        """Bytes that the float32 logits of one head would take in full."""
        return 4 * self.rows * self.vocab_size


@dataclass(frozen=True)
class Timing:
    job: str
    rows: int
    vocab_size: int
    width: int
    dtype: str
    budget_mb: float
    median_s: float
    products_s: float  # median of the products alone
    ratio: float
    processor_ratio: float

    HEADER = (
        f"{'job':15}{'dtype':9}{'rows':>6}{'vocab':>8}{'width':>6}{'budget MB':>10}"
        f"{'seconds':>9}{'products':>9}{'ratio':>7}{'by CPU':>7}"
    )

    def __str__(self) -> str:
        return (
            f"{self.job:15}{self.dtype:9}{self.rows:6}{self.vocab_size:8}{self.width:6}"
            f"{self.budget_mb:10.0f}{self.median_s:9.3f}{self.products_s:9.3f}{self.ratio:7.2f}"
            f"{self.processor_ratio:7.2f}"
        )


@dataclass(frozen=True)
class Memory:
    job: str
    rows: int
    vocab_size: int
    width: int
    dtype: str
    budget_mb: float
    peak_mb: float  # on top of the inputs
    results_mb: float  # the part of it in outputs and gradients
    hidden_sums_mb: float  # and the gradient of the hidden states in float32, if that is another
    logits_mb: float  # size of all heads' logits in float32, if they were stored

    HEADER = (
        f"{'job':15}{'dtype':9}{'budget MB':>10}{'peak MB':>9}{'results':>9}{'sums':>6}"
        f"{'logits':>8}"
    )

    def __str__(self) -> str:
        return (
            f"{self.job:15}{self.dtype:9}{self.budget_mb:10.0f}{self.peak_mb:9.0f}"
            f"{self.results_mb:9.0f}{self.hidden_sums_mb:6.0f}{self.logits_mb:8.0f}"
        )


def make_heads(shape: Shape) -> tuple[Head, Head, Tensor]:
    """Policy, reference and token ids; logits of about unit size."""
    dtype = getattr(torch, shape.dtype)
    generator = torch.Generator().manual_seed(0)

    def normal(n: int) -> Tensor:
        result = torch.empty(n, shape.width, dtype=dtype)
        for part in result.split(4096):  # no float32 copy of it all
            part.copy_(torch.randn(part.shape, generator=generator) * shape.width**-0.25)
        return result

    policy, reference = (
        Head(normal(shape.rows)[None], normal(shape.vocab_size), None) for _ in range(2)
    )
    policy.hidden.requires_grad_()
    policy.weight.requires_grad_()
    return policy, reference, torch.randint(shape.vocab_size, (1, shape.rows), generator=generator)


def ours(job: str, shape: Shape, budget: int) -> Callable[[], object]:
    policy, reference, token_ids = make_heads(shape)
    factors = policy.hidden, policy.weight

    def call() -> object:
        with torch.set_grad_enabled(job.endswith("backward")):
            if job.startswith("stats"):
                outputs = kl_kernels.linear_token_stats(*factors, token_ids, memory_budget=budget)
            else:
                outputs = kl_kernels.linear_token_kl(
                    *factors, reference.hidden, reference.weight, token_ids, memory_budget=budget
                )
        if not job.endswith("backward"):
            return outputs
        loss = outputs.logprob.sum() - outputs.entropy.sum()
        if job.startswith("kl"):
            loss = loss + outputs.kl.sum()
        return outputs, torch.autograd.grad(loss, factors)

    return call


def products(job: str, shape: Shape, budget: int) -> Callable[[], object]:
    """The same tiles, multiplied and forgotten."""
    heads = [head._replace(hidden=head.hidden[0]) for head in make_heads(shape)[:2]]
    heads = heads[: 1 + job.startswith("kl")]
    factors = [(head.hidden.detach().float(), head.weight.detach().float()) for head in heads]

    def multiply(backward: bool) -> object:
        per = bytes_of(heads, gradient=backward, weight_gradient=backward)
        plan = plan_tiles(shape.rows, shape.vocab_size, per, budget)
        buffers = [torch.empty(plan.rows * plan.columns) for _ in heads]
        grads = [torch.zeros_like(factor) for factor in factors[0]] if backward else []
        for columns in plan.column_slices():
            for rows in plan.row_slices():
                tiles = []
                for (hidden, weight), buffer in zip(factors, buffers):
                    size = rows.stop - rows.start, columns.stop - columns.start
                    tile = buffer[: size[0] * size[1]].view(size)
                    tiles.append(torch.mm(hidden[rows], weight[columns].t(), out=tile))
                if backward:
                    hidden, weight = factors[0]
                    grads[0][rows].addmm_(tiles[0], weight[columns])
                    grads[1][columns].addmm_(tiles[0].t(), hidden[rows])
        return grads

    @torch.no_grad()
    def call() -> object:
        multiply(backward=False)
        return multiply(backward=True) if job.endswith("backward") else None

    return call


def time_job(job: str, shape: Shape, budget: int, turns: int) -> Timing:
    calls = {"ours": ours(job, shape, budget), "products": products(job, shape, budget)}
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            start = time.perf_counter(), time.process_time()
            call()
            if turn > 0:  # the first warms up
                taken[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    ratios = [
        [mine[clock] / bare[clock] for mine, bare in zip(taken["ours"], taken["products"])]
        for clock in range(2)
    ]
    return Timing(
        job,
        **asdict(shape),
        budget_mb=budget / 1e6,
        median_s=statistics.median(wall for wall, _ in taken["ours"]),
        products_s=statistics.median(wall for wall, _ in taken["products"]),
        ratio=statistics.median(ratios[0]),
        processor_ratio=statistics.median(ratios[1]),
    )


def measure_memory(job: str, shape: Shape, budget: int, threads: int) -> Memory:
    """Measure in a separate process, where no job has freed memory that could be used again."""
    code = (
        "import json, torch; from bench.cpu import linear; "
        f"torch.set_num_threads({threads}); "
        f"linear.report_peak({job!r}, linear.Shape(**json.loads({json.dumps(asdict(shape))!r})), "
        f"{budget})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    itemsize = getattr(torch, shape.dtype).itemsize
    gradients = shape.width * (shape.rows + shape.vocab_size) * itemsize
    backward = job.endswith("backward")
    return Memory(
        job,
        **asdict(shape),
        budget_mb=budget / 1e6,
        peak_mb=json.loads(done.stdout) / 1e6,
        results_mb=(5 * 4 * shape.rows + backward * gradients) / 1e6,
        hidden_sums_mb=backward * (itemsize < 4) * 4 * shape.rows * shape.width / 1e6,
        logits_mb=shape.logits_bytes * (1 + job.startswith("kl")) / 1e6,
    )


def report_peak(job: str, shape: Shape, budget: int) -> None:
    # A small call first: libraries allocate what they need once, whatever the size.
    ours(job, Shape(256, 4096, shape.width, shape.dtype), 8 << 20)()
    call = ours(job, shape, budget)
    with PeakMemory() as peak:
        call()
    print(json.dumps(peak.extra))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--memory-rows", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=131072)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--jobs", nargs="+", default=JOBS, choices=JOBS)
    parser.add_argument("--budgets", type=int, nargs="+", default=[MEMORY_BUDGETS["cpu"]])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "linear.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = record()
    print(f"{results['device']}, {args.threads} threads")

    def runs(n_rows: int) -> list[tuple[str, Shape, int]]:
        shapes = [Shape(n_rows, args.vocab, args.width, dtype) for dtype in args.dtypes]
        return [(job, shape, b) for shape in shapes for b in args.budgets for job in args.jobs]

    print(Timing.HEADER)
    timings, memory = [], []
    for run in runs(args.rows):
        timings.append(time_job(*run, args.turns))
        print(timings[-1], flush=True)
    print(Memory.HEADER)
    for run in runs(args.memory_rows):
        memory.append(measure_memory(*run, args.threads))
        print(memory[-1], flush=True)
    results |= {
        "load_average_at_end": round(os.getloadavg()[0], 2),
        "timings": [asdict(timing) for timing in timings],
        "memory": [asdict(m) for m in memory],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
