"""The Triton kernels with other sizes of their work, side by side: what `LaunchConfig` should say.

python -m bench.gpu.sweep            # a GPU: to bench/results/sweep_<chip>.json
TRITON_INTERPRET=1 python -m bench.gpu.sweep --dry-run  # none: tiny cases in Triton's interpreter

For every job and size, each variation takes as long as the present sizes times its figure: below 1
it is better. A variation that is wrong in float64, or does not fit the GPU, is left out by name.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import chip_name, gpu_record, record
from bench.common.timing import Replay, interleaved, n_buffer_sets, n_rounds_of_sets, replay
from bench.gpu.jobs import JOBS, Launch, make_buffers
from bench.offline.jobs import ROWS
from bench.offline.jobs import VOCAB_SIZE as V
from kl_kernels.backends.triton import launch

RESULTS = Path(__file__).parents[1] / "results"
NOW = "as it is"
Changes = dict[str, int]
FOLD: list[Changes] = [
    *({"fold_split": n} for n in (8192, 16384, 65536, 131072)),
    *({"steps": n} for n in (1, 4)),
    {"lanes": 256, "num_warps": 8},
    {"lanes": 256, "num_warps": 8, "steps": 1},
    {"fold_split": 16384, "steps": 4},
]
GRADIENT: list[Changes] = [
    *({"backward_split": n} for n in (4096, 8192, 32768, 65536)),
    *({"steps": n} for n in (1, 4)),
    {"lanes": 256, "num_warps": 8},
]
VISIT: list[Changes] = [
    {"policy_loss_lanes": 512, "policy_loss_warps": 16},
    {"policy_loss_lanes": 512, "policy_loss_warps": 16, "steps": 4},
    *({"steps": n} for n in (1, 4)),
]
UNALIGNED: list[Changes] = [
    *({"unaligned_steps": n} for n in (4, 16)),
    {"lanes": 256, "num_warps": 8, "unaligned_steps": 4},
    {"fold_split": 65536},
]
UNALIGNED_V = 50257
CASES = (
    *(("token_kl", rows, V, FOLD) for rows in (ROWS, 64, 1, 8, 512)),
    *(("token_stats", rows, V, FOLD) for rows in (ROWS, 64)),
    ("policy loss", ROWS, V, VISIT),
    *(("KL gradient", rows, V, GRADIENT) for rows in (ROWS, 64)),
    *((job, ROWS, UNALIGNED_V, UNALIGNED) for job in ("token_kl", "KL gradient", "policy loss")),
    ("stats gradient", ROWS, V, GRADIENT),
)


def label(changes: Changes) -> str:
    return ", ".join(f"{name} {value}" for name, value in changes.items()) or NOW


@contextmanager
def sizes(changes: Changes) -> Iterator[None]:
    before = launch.CONFIG
    launch.CONFIG = replace(before, **changes)
    try:
        yield
    finally:
        launch.CONFIG = before


def run(
    job: str, rows: int, vocab_size: int, variations: list[Changes], turns: int, device: str
) -> tuple[dict[str, float], dict[str, str]]:
    """Microseconds by variation, and why others were left out."""
    n_bytes = 2 * (JOBS[job].reads + JOBS[job].writes) * rows * vocab_size
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    n_sets = n_buffer_sets(n_bytes, l2_bytes)
    # Triton's interpreter cuts bfloat16 off instead of rounding.
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sets = [
        make_buffers(rows, vocab_size, ("triton",), device, seed, dtype) for seed in range(n_sets)
    ]
    rounds = n_rounds_of_sets(n_sets, n_bytes) if device == "cuda" else 1
    ready: dict[str, Replay] = {}
    failed = {}
    for changes in [{}, *variations]:
        call: Launch = JOBS[job].ours("triton")
        try:
            with sizes(changes):
                JOBS[job].check(call, sets[0])
                ready[label(changes)] = replay(call, sets, rounds, device)
        except Exception as error:  # the other variations are still measured
            failed[label(changes)] = f"{type(error).__name__}: {str(error)[:200]}"
    times = interleaved(ready, turns)
    return {name: 1e6 * statistics.median(taken) for name, taken in times.items()}, failed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory")
    parser.add_argument("--seconds", type=float, default=200, help="no case starts later")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--commit", help="where the files are not in a git repository")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    start = time.monotonic()
    facts = record() if args.dry_run else gpu_record()
    chip = "dry_run" if args.dry_run else chip_name(str(facts["device"]))
    results: dict[str, Any] = facts | {
        "commit": args.commit or facts["commit"],
        "sizes": vars(launch.CONFIG),
        "cases": [],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"sweep_{chip}.json"
    tried = set()
    for job, rows, vocab_size, variations in CASES:
        if args.dry_run and job in tried:  # Triton's interpreter takes seconds for each
            continue
        tried.add(job)
        if args.dry_run:
            rows, vocab_size, variations = 1, 700, variations[-1:]
        if time.monotonic() - start > args.seconds:
            print(f"{job} {rows} x {vocab_size}: the time is up")
            continue
        found, failed = run(
            job, rows, vocab_size, variations, args.turns, "cpu" if args.dry_run else "cuda"
        )
        results["cases"].append(
            {"job": job, "rows": rows, "vocab_size": vocab_size, "us": found, "failed": failed}
        )
        path.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\n{job} {rows} x {vocab_size}: {found.get(NOW, float('nan')):.1f} us")
        for name in sorted(found, key=lambda name: found[name]):
            print(f"  {found[name] / found.get(NOW, float('nan')):6.3f}  {name}")
        for name, why in failed.items():
            print(f"  failed  {name}: {why}", flush=True)
        gc.collect()
        if not args.dry_run:
            torch.cuda.empty_cache()
    print(f"\nwritten to {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
