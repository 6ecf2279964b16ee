"""Traffic of logits through memory: last-level cache misses of a policy loss, simulated.

python -m bench.cpu.traffic          # both ways, to bench/results/traffic.json

A policy loss with an exact KL must read the policy's and the reference's logits and write one
gradient: 3 tensors of logits. Cachegrind counts the lines a core misses in a cache of 1 MiB, the
second-level cache of current servers; the fixed cost of a call cancels between two numbers of
rows, and making the inputs is counted by itself and subtracted. It needs valgrind, which knows no
AVX-512, so the kernels run in AVX2.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.common.formulas import gradient_of, one_visit, ours, two_visits
from bench.common.machine import record

V = 131072
ROWS = (8, 24)
CACHE_BYTES, LINE_BYTES = 1 << 20, 64
INPUTS_ALONE = "inputs"
WAYS = {"one visit": one_visit, "two visits": two_visits(ours)}
RESULTS = Path(__file__).parents[1] / "results" / "traffic.json"


def run(way: str, n_rows: int) -> None:
    """The call that is counted. Its inputs are all the same row, which is quick to make."""
    torch.set_num_threads(1)
    row = torch.linspace(-8, 8, V).bfloat16()
    logits, ref_logits = row.repeat(n_rows, 1).requires_grad_(), row.repeat(n_rows, 1)
    if way != INPUTS_ALONE:
        gradient_of(WAYS[way])(logits, ref_logits, torch.full((n_rows,), V - 1))


def misses(way: str, n_rows: int) -> dict[str, int]:
    """Lines read and lines written that were not in the cache."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *("valgrind", "--tool=cachegrind", "--cache-sim=yes"),
            f"--LL={CACHE_BYTES},16,{LINE_BYTES}",
            f"--cachegrind-out-file={folder}/out",
            *(sys.executable, "-m", __spec__.name, way, str(n_rows)),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found = re.search(r"LLd misses:.*\(\s*([\d,]+) rd\s*\+\s*([\d,]+) wr\)", done.stderr)
    if found is None:
        raise RuntimeError(f"cachegrind printed no LLd misses: {done.stderr[-500:]}")
    return dict(zip(("read", "written"), (int(n.replace(",", "")) for n in found.groups())))


def main() -> None:
    if len(sys.argv) == 3:
        run(sys.argv[1], int(sys.argv[2]))
        return
    jobs = [(way, n) for way in (INPUTS_ALONE, *WAYS) for n in ROWS]
    with ThreadPoolExecutor(2) as pool:
        counted = dict(zip(jobs, pool.map(lambda job: misses(*job), jobs)))
    few, many = ROWS
    lines = (many - few) * V * 2 / LINE_BYTES  # per tensor of logits
    results = record() | {"rows": ROWS, "vocab_size": V, "cache_bytes": CACHE_BYTES, "tensors": {}}

    def growth(way: str, kind: str) -> float:
        return (counted[way, many][kind] - counted[way, few][kind]) / lines

    for way in WAYS:
        moved = {
            kind: growth(way, kind) - growth(INPUTS_ALONE, kind) for kind in ("read", "written")
        }
        results["tensors"][way] = moved
        print(way, moved)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
