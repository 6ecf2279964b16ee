"""Instructions per logit of this package's Triton kernels beside other libraries', without a GPU.

Every kernel is compiled for sm_90 as its own library launches it for logits of 8192 x 128256 in
bfloat16, and its machine code is counted as `python -m kl_kernels codegen` counts ours. The least
time on an H200 is what `kl_kernels/lab/codegen/chips.py` predicts from these counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from bench.common.machine import record
from bench.offline.figures import instructions, least_times
from bench.offline.jobs import JOBS, OURS, ROWS, VOCAB_SIZE
from kl_kernels.lab.documents import Block, Bullets, Heading, Picture, Table, Text


def pictures(results: dict[str, Any]) -> dict[str, bytes]:
    """SVG, by name."""
    return {
        "offline_instructions": instructions(results),
        "offline_least_times": least_times(results),
    }


def blocks(results: dict[str, Any]) -> list[Block]:
    shape = f"{results['rows']} x {results['vocab_size']}"
    return [
        Heading("Machine code, counted without a GPU"),
        Text(
            "Every kernel is compiled for an H200 as its own library launches it for bfloat16 "
            f"logits of {shape}, and the instructions of its loops over the vocabulary are counted "
            "in the machine code. Launches are recorded from the library's own host code."
        ),
        Picture("offline_instructions", "Instructions that one thread executes per logit"),
        Picture("offline_least_times", f"The least time of {shape} on an H200"),
        *job_blocks(results),
        Text("Not counted:"),
        Bullets([f"{name}: {reason}" for name, reason in results["left_out"].items()]),
        Text("Not a library's own:"),
        Bullets([f"{name}: {what}" for name, what in results["stand_ins"].items()]),
        Text(
            "Per logit, or per pair of a policy's and a reference's: half a pair's figures are a "
            "logit's. The least time is the slowest of memory, instruction "
            "issue and special functions at an H200's peak rates; what is left out (launches, "
            "reductions' waiting at barriers, too few warps to hide latency) can only add to it. "
            "Of a second look at a row, the L2 holds what it has room for. "
            f"{results['compiler']} and its ptxas; commit {results['commit']}. From "
            "`bench/results/offline.json`, made by `make bench-offline`."
        ),
    ]


def job_blocks(results: dict[str, Any]) -> list[Block]:
    found: list[Block] = []
    for job, says in JOBS.items():
        found += [Text(f"**{job}**: {says}."), table(results, job)]
    return found


def table(results: dict[str, Any], job: str) -> Table:
    header = (
        "kernel", "computes", "per", "instructions", "MUFU", "loads", "reads", "bytes written",
        "barriers", "registers", "stack bytes", "least ms", "bound by", "launched with",
    )  # fmt: skip
    rows = [
        (
            f"{row['library']}: {row['name']}",
            row["computes"] + (f"; {row['notes']}" if row["notes"] else ""),
            row["unit"],
            " + ".join(f"{loop['instructions']:.1f}" for loop in row["loops"]),
            f"{row['mufu']:.2f}",
            f"{sum(loop['loads'] for loop in row['loops']):.2f}",
            f"{row['reads']:.0f}",
            f"{row['written']:.0f}",
            " + ".join(str(loop["barriers"]) for loop in row["loops"]),
            str(row["registers"]),
            str(row["stack"]),
            f"{row['least_ms']:.2f}",
            row["bound_by"],
            row["launch"],
        )
        for row in results["kernels"]
        if row["job"] == job
    ]
    return Table(header, rows)


def rank(row: dict[str, Any]) -> tuple[int, bool, float]:
    """Job by job, ours first, then the leanest."""
    per_logit = row["instructions"] / (2 if row["unit"] == "pair" else 1)
    return list(JOBS).index(row["job"]), row["library"] != OURS, per_logit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results" / "offline.json"
    )
    args = parser.parse_args()

    # Imported here: what shows the results needs no Triton.
    import triton

    from bench.offline.count import ARCH, CHIP, our_rows, peer_rows, shown, slots_per_logit
    from bench.offline.peers import CALLS
    from kl_kernels.lab.codegen.compile import empty_cache

    warnings.simplefilter("ignore")  # libraries warn about what this machine lacks
    results = record() | {
        "compiler": f"Triton {triton.__version__}",
        "arch": ARCH,
        "chip": CHIP,
        "rows": ROWS,
        "vocab_size": VOCAB_SIZE,
    }
    with empty_cache():
        ours = our_rows()
        print("\n".join(map(shown, ours)))
        peers, left_out = peer_rows()
    kernels = sorted(ours + peers, key=rank)
    stand_ins = {call.library: call.stand_ins for call in CALLS if call.stand_ins}
    results["slots_per_logit"] = slots_per_logit()
    results |= {"kernels": kernels, "left_out": left_out, "stand_ins": stand_ins}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
