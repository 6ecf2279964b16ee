"""The GPU's own counters for the main kernels, by Nsight Compute: where their time goes.

python -m bench.gpu.counters   # a GPU and ncu; to bench/results/counters_<chip>.json
python -m bench.gpu.counters --launch triton token_kl   # what ncu watches: one job, once, when warm

Counters of instructions are held beside what `python -m kl_kernels codegen` counts in machine code.
"""

from __future__ import annotations

import argparse
import csv
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.offline.jobs import ROWS, VOCAB_SIZE

RESULTS = Path(__file__).parents[1] / "results"
BACKENDS = ("triton", "cuda")
WATCHED = ("token_kl", "KL gradient", "policy loss", "token_stats")
WARP = 32
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "Occupancy",
    "LaunchStats",
    "InstructionStats",
)
# In base units: bytes, nanoseconds, percent. Of no section: what DRAM and special functions did.
METRICS = {
    "nanoseconds": "gpu__time_duration.sum",
    "dram_percent": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "l2_hit_percent": "lts__t_sector_hit_rate.pct",
    "issue_per_clock": "smsp__issue_active.avg.per_cycle_active",
    "mufu_percent": "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "warp_instructions": "smsp__inst_executed.sum",
}
ASKED = ("bytes_read", "bytes_written", "mufu_percent", "warp_instructions")
STALL = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
MOST_STALLS = 4


def find_tool(name: str) -> str | None:
    """One of the CUDA toolkit's programs, which are not always on the path."""
    places = [
        "/usr/local/cuda*/bin",
        f"/usr/local/cuda*/{name}",
        "/opt/nvidia/*",
        "/opt/nvidia/*/*",
    ]
    found = [path for place in places for path in sorted(glob.glob(f"{place}/{name}"))]
    found = [path for path in found if os.path.isfile(path) and os.access(path, os.X_OK)]
    return shutil.which(name) or (found[-1] if found else None)


def watched(ncu: str, backend: str, job: str, log: Path) -> list[str]:
    """The command that counts one job's kernels and writes a table of all their metrics."""
    return [
        ncu, "--profile-from-start", "off", "--clock-control", "none", "--csv", "--page", "raw",
        "--print-units", "base", "--log-file", str(log),
        *(option for name in SECTIONS for option in ("--section", name)),
        "--metrics", ",".join(METRICS[name] for name in ASKED),
        sys.executable, "-m", __spec__.name, "--launch", backend, job,
    ]  # fmt: skip


def counted(ncu: str, backend: str, job: str, rows: int, vocab_size: int) -> tuple[str, str]:
    """Return ncu's table of one job, and its error message if it failed."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "table.csv"
        sizes = ["--rows", str(rows), "--vocab-size", str(vocab_size)]
        command = [*watched(ncu, backend, job, log), *sizes]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        table = log.read_text(errors="replace") if log.exists() else ""
    told = " ".join((table + done.stdout + done.stderr).split())[-400:]
    return table, f"exit code {done.returncode}: {told}" if done.returncode else ""


def launch(backend: str, job: str, rows: int, vocab_size: int) -> None:
    import torch

    from bench.gpu.jobs import JOBS, make_buffers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    buffers = make_buffers(rows, vocab_size, (backend,), device, seed=0)
    call = JOBS[job].ours(backend)
    JOBS[job].check(call, buffers)
    if device == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call(buffers)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def kernels(table: str, n_logits: int) -> Iterator[dict[str, Any]]:
    """Read each kernel's figures from ncu's table; those it did not count are left out."""
    lines = [line for line in table.splitlines() if line.startswith('"')]
    for row in csv.DictReader(lines):
        if not row["ID"]:
            continue  # the units
        values = {name: number(value) for name, value in row.items() if name and value}
        found = {name: values[metric] for name, metric in METRICS.items() if metric in values}
        if (executed := found.pop("warp_instructions", None)) is not None:
            found["instructions_per_logit"] = executed * WARP / n_logits
        begin, end = STALL
        stalls = {
            name.removeprefix(begin).removesuffix(end): value
            for name, value in values.items()
            if name.startswith(begin) and name.endswith(end) and value is not None
        }
        stalls.pop("selected", None)  # a warp that issues is not stalled
        worst = sorted(stalls, key=lambda reason: -stalls[reason])[:MOST_STALLS]
        yield {
            "kernel": row["Kernel Name"],
            **{name: value for name, value in found.items() if value is not None},
            "stalls": {reason: stalls[reason] for reason in worst},
        }


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def shown(row: dict[str, Any]) -> str:
    stalls = ", ".join(f"{name} {value:.1f}" for name, value in row["stalls"].items())
    values = ", ".join(
        f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float)
    )
    return f"{row['backend']:8}{row['job']:16}{row['kernel'][:40]:42}{values}; stalls: {stalls}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory")
    parser.add_argument("--commit", help="where the files are not in a git repository")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--launch", nargs=2, metavar=("BACKEND", "JOB"))
    args = parser.parse_args()
    if args.launch:
        launch(*args.launch, args.rows, args.vocab_size)
        return 0
    ncu = find_tool("ncu")
    if ncu is None:
        print("error: ncu is not on this machine", file=sys.stderr)
        return 2

    from bench.common.machine import chip_name, gpu_record
    from bench.gpu.jobs import JOBS

    facts = gpu_record()
    results = facts | {
        "commit": args.commit or facts["commit"],
        "rows": args.rows,
        "vocab_size": args.vocab_size,
        "kernels": [],
        "failed": {},
    }
    chip = chip_name(str(facts["device"]))
    args.results.mkdir(parents=True, exist_ok=True)
    path = args.results / f"counters_{chip}.json"
    everything = args.results / f"counters_{chip}.csv"  # more than is read of it here
    everything.write_text("")
    for job in WATCHED:
        for backend in BACKENDS:
            name = f"{job}, {backend}"
            text, told = counted(ncu, backend, job, args.rows, args.vocab_size)
            with everything.open("a") as file:
                file.write(f"{name}\n{text}\n")
            found = list(kernels(text, args.rows * args.vocab_size * JOBS[job].reads))
            for row in found:
                results["kernels"].append({"backend": backend, "job": job, **row})
                print(shown(results["kernels"][-1]), flush=True)
            if told or not found:
                results["failed"][name] = told or "no kernels were counted"
                print(f"{name}: {results['failed'][name]}", flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {path}")
    return int(bool(results["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
