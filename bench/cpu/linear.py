"""Linear heads on a CPU, beside what one would write or install instead: `make bench-linear`.

All of the adapters in `bench/peers/contenders` that run here: torch as it is and compiled, its own
linear cross-entropy, and other packages' heads; `bench/peers/linear.py` says how they are timed.
Memory is the peak of resident memory on top of inputs. Cases come in order of importance;
one that would not end in time is left out, by name. Results are written after every case.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import instruction_sets, record
from bench.peers.definitions import Size
from bench.peers.linear import FROZEN, LinearCase, measure, shown
from bench.peers.versions import peer_versions
from kl_kernels.functional.hidden_arguments import MEMORY_BUDGETS

RESULTS = Path(__file__).parents[1] / "results" / "linear.json"
SMALL, QWEN, LARGE, MANY_ROWS = (
    Size(256, 32768, 256),
    Size(64, 151936, 896),  # Qwen 2.5 0.5B
    Size(256, 131072, 1024),
    Size(1024, 131072, 256),
)
NARROW, WIDE = torch.bfloat16, torch.float32
COMPILERS, CALLS = 40, 4  # seconds of a case that compilers take, and calls of each contender


def cases() -> Iterator[LinearCase]:
    """Most important first; where bfloat16 is slow, the last ones take too long."""
    of, trained, loss = LinearCase.of, "statistics + gradients", "policy loss + gradients"
    yield from (of(job, SMALL, t) for t in (NARROW, WIDE) for job in ("statistics", trained, loss))
    yield of("statistics", QWEN, NARROW)
    yield from (of(job, QWEN, WIDE) for job in (trained, f"policy loss + {FROZEN}"))
    yield of(loss, LARGE, WIDE)
    yield of(trained, MANY_ROWS, WIDE)
    yield of(f"statistics + {FROZEN}", SMALL, NARROW)
    yield of("statistics", LARGE, NARROW)
    yield from (of(job, QWEN, NARROW) for job in (trained, f"policy loss + {FROZEN}"))


class Estimate:
    """Seconds that a case will take, from the calls of those that were measured."""

    def __init__(self) -> None:
        self.per_product: dict[tuple[torch.dtype, bool], float] = {}  # all contenders' calls

    def learn(self, case: LinearCase, rows: list[dict[str, Any]]) -> None:
        calls = sum(m["median_ms"] for m in rows) / 1e3
        self.per_product[self._kind(case)] = calls / self._size(case)

    def seconds(self, case: LinearCase) -> float:
        known = self.per_product.get(self._kind(case), 0.0)
        return COMPILERS + CALLS * known * self._size(case)

    @staticmethod
    def _kind(case: LinearCase) -> tuple[torch.dtype, bool]:
        return case.dtype, "+" in case.job

    @staticmethod
    def _size(case: LinearCase) -> int:
        return case.size.rows * case.size.vocab_size * case.size.width


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--seconds", type=float, default=580, help="for all cases")
    parser.add_argument("--budget", type=int, help="memory_budget of ours, in bytes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    start = time.monotonic()
    torch.set_num_threads(args.threads)
    MEMORY_BUDGETS["cpu"] = args.budget or MEMORY_BUDGETS["cpu"]
    results: dict[str, Any] = record() | {
        "kind": "cpu",
        "instruction_sets": instruction_sets(),
        "command": command(parser, args),
        "memory_budget_mb": MEMORY_BUDGETS["cpu"] / 1e6,
        "peers": peer_versions(),
        "measurements": [],
        "not_measured": [],
    }
    print(f"{results['device']}, {' '.join(results['instruction_sets'])}, {args.threads} threads")
    estimate = Estimate()
    for case in cases():
        if args.only not in str(case):
            continue
        if time.monotonic() - start + estimate.seconds(case) > args.seconds:
            reason = "would not have ended in time"
            late = {"operation": str(case), "contender": "all", "reason": reason}
            results["not_measured"].append(late)
            continue
        rows, left_out = measure(case)
        estimate.learn(case, rows)
        print("\n".join([str(case), *map(shown, rows)]), flush=True)
        results["measurements"] += rows
        known = results["not_measured"]
        results["not_measured"] += [entry for entry in left_out if entry not in known]
        save(results, args.out)
        case.forget()
        gc.collect()
    save(results, args.out)
    print(f"written to {args.out} after {time.monotonic() - start:.0f} s")


def command(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """`make bench-linear`, and the options that are not the usual ones."""
    changed = {k: v for k, v in vars(args).items() if v != parser.get_default(k) and k != "out"}
    options = " ".join(f"--{name} {value}" for name, value in changed.items())
    return f"make bench-linear ARGS='{options}'" if options else "make bench-linear"


def save(results: dict[str, Any], path: Path) -> None:
    results["load_average_at_end"] = round(os.getloadavg()[0], 2)
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
