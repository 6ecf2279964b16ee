"""Linear heads on a GPU, beside their matrix products alone and other packages.

python -m bench.gpu.heads            # a GPU: every case, to bench/results/heads_<chip>.json
python -m bench.gpu.heads --dry-run  # none: tiny cases by wall clock

`bench/peers/linear.py` says how contenders are timed. **Share** is the time of the products that
ours multiplies, each measured whole at the head's own shapes in the same run, over the time of the
call. At few rows the host is what takes time: such cases have the time of a call from Python beside
that of a replayed graph. Results are written after every case.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import chip_name, gpu_record, record
from bench.common.timing import from_python, replay
from bench.gpu.ceilings import product_seconds
from bench.gpu.targets import HEAD_TARGETS, verdict
from bench.peers.compare import DEVICE
from bench.peers.contenders import OURS
from bench.peers.definitions import Size
from bench.peers.linear import JOBS, SECONDS, LinearCase, Timed, measure, shown
from bench.peers.page import labelled, made, number, reasons
from bench.peers.versions import peer_versions
from kl_kernels.lab.documents import Block, Bullets, Heading, Table, Text

FOLDER = Path(__file__).parents[1] / "results"
LLAMA, QWEN = Size(8192, 128256, 4096), Size(8192, 151936, 896)
FEW = tuple(Size(rows, 128256, 4096) for rows in (1, 64))
FEW_ROWS, REPLAYS = 64, 7
DTYPE = torch.bfloat16
# Products that ours multiplies: for logits, for a gradient of hidden states, for one of the weight.
# Where the loss comes after the statistics, logits are multiplied again for their gradient; a
# divergence from a mixture needs both normalisers first.
PRODUCTS = {
    job: (n, int("+" in job), int(job.endswith("+ gradients")))
    for of, forward, trained in (
        ("statistics", 1, 2), ("exact KL", 2, 4), ("JSD", 4, 6), ("policy loss", 1, 1),
    )
    for job, n in ((j, trained if "+" in j else forward) for j in JOBS if j.startswith(of))
}  # fmt: skip
Results = dict[str, Any]
Row = dict[str, Any]


def cases() -> Iterator[LinearCase]:
    """Most important first."""
    gradients = [job for job in JOBS if "+" in job]
    forward = [job for job in JOBS if "+" not in job]
    for jobs, sizes in ((gradients, (LLAMA,)), (forward, (LLAMA,)), (JOBS, (QWEN, *FEW))):
        yield from (LinearCase.of(job, size, DTYPE) for size in sizes for job in jobs)


def dry_cases() -> list[LinearCase]:
    few, many = Size(1, 300, 16), Size(70, 300, 16)
    wanted = [*((job, few) for job in JOBS), ("policy loss + gradients", many)]
    return [LinearCase.of(job, size, DTYPE) for job, size in wanted]


class Heads:
    """Measurements and the products that they are shares of."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds  # a contender's time in a case
        self.products: dict[str, dict[str, float]] = {}  # seconds by size

    def run(self, case: LinearCase) -> tuple[list[Row], list[dict[str, str]]]:
        size = str(case.size)
        if size not in self.products:
            x = case.inputs
            self.products[size] = product_seconds(x.hidden.detach(), x.weight.detach())
        of = self.products[size]
        least = 1e3 * sum(n * of[name] for n, name in zip(PRODUCTS[case.job], of))
        more = self.at_few_rows if case.size.rows <= FEW_ROWS else no_more
        rows, left_out = measure(case, more, self.seconds)
        for m in rows:
            m["products_ms"], m["share"] = least, least / m["median_ms"]
        return rows, left_out

    def at_few_rows(self, one: Timed) -> Row:
        """Microseconds from Python, and of a replay where a graph of the call can be captured."""
        found: Row = {"call_us": 1e6 * from_python(one.call, one.x, DEVICE)}
        try:
            ready = replay(one.call, [one.x], 1, DEVICE)
            found["replay_us"] = 1e6 * statistics.median(ready() for _ in range(REPLAYS))
        except RuntimeError as error:  # it waits for the GPU within
            found["no_replay"] = str(error).partition("\n")[0]
        return found

    def tflop_per_s(self) -> dict[str, dict[str, float]]:
        """Rates of the products, by size."""
        found = {}
        for size, seconds in self.products.items():
            rows, vocab, width = map(int, size.split(" x "))
            found[size] = {k: 2e-12 * rows * vocab * width / s for k, s in seconds.items()}
        return found


def no_more(_: Timed) -> Row:
    return {}


def pictures(results: Results) -> dict[str, bytes]:
    return {}


def blocks(results: Results) -> list[Block]:
    rates = "; ".join(
        f"{size}: " + ", ".join(f"{name} {rate:.0f}" for name, rate in of.items())
        for size, of in results["products_tflop_per_s"].items()
    )
    found: list[Block] = [
        Heading(f"Linear heads on {results['device']}"),
        Text(
            "Rows x vocabulary x width, bfloat16; every contender was right in float64 before it "
            "was timed. **Share**: the matrix products that ours multiplies, measured alone at the "
            f"same shapes, over the time of the call. TFLOP/s of these products, {rates}."
        ),
        Text("**What they are to reach**, and the worst figure of those that were measured:"),
        Table(("", OURS), [(t.says, verdict(t, results, OURS)) for t in HEAD_TARGETS]),
        Text("**Everything that was measured**:"),
        Table(
            ("job", "size", "", "median ms (fastest to slowest)", "x ours", "share", "MB allocated",
             "us from Python", "us replayed"),
            [line(m) for m in results["measurements"]],
        ),
    ]  # fmt: skip
    if results["not_measured"]:
        found += [Text("Not measured:"), Bullets(reasons(results))]
    return [*found, Text(made(results))]


def line(m: Row) -> tuple[str, ...]:
    ours = m["contender"] == OURS
    return (
        m["job"],
        m["size"],
        f"**{OURS}**" if ours else labelled(m),
        f"{number(m['median_ms'])} ({number(m['fastest_ms'])} to {number(m['slowest_ms'])})",
        "" if ours else f"**{m['ratio']:.2f}**",
        f"{m['share']:.0%}" if ours else "",
        f"{m['extra_mb']:.0f}",
        f"{m['call_us']:.0f}" if "call_us" in m else "",
        f"{m['replay_us']:.0f}" if "replay_us" in m else m.get("no_replay", ""),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=FOLDER, help="directory")
    parser.add_argument("--seconds", type=float, default=380, help="no case starts later")
    parser.add_argument("--commit", help="where the files are not in a git repository")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    facts = record() if args.dry_run else gpu_record()
    results: Results = facts | {
        "commit": args.commit or facts["commit"],
        "kind": "cpu" if args.dry_run else "cuda",
        "command": 'make gpu ARGS="--parts heads"',
        "peers": peer_versions(),
        "measurements": [],
        "not_measured": [],
    }
    name = "dry_run" if args.dry_run else chip_name(str(facts["device"]))
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"heads_{name}.json"
    heads = Heads(0.0 if args.dry_run else SECONDS)
    for case in dry_cases() if args.dry_run else cases():
        known, reason = results["not_measured"], "the time was up"
        left_out = [{"operation": str(case), "contender": "all", "reason": reason}]
        if time.monotonic() - start < args.seconds:
            with torch.compiler.set_stance("force_eager" if args.dry_run else "default"):
                rows, left_out = heads.run(case)
            print("\n".join([str(case), *map(shown, rows)]), flush=True)
            results["measurements"] += rows
        results["not_measured"] += [entry for entry in left_out if entry not in known]
        results["products_tflop_per_s"] = heads.tflop_per_s()
        path.write_text(json.dumps(results, indent=1) + "\n")
        case.forget()
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()
    for target in HEAD_TARGETS:
        print(f"{target.says}: {verdict(target, results, OURS)}")
    print(f"written to {path} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
