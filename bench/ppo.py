"""Trains with and without a KL penalty and keeps how each run ended: `bench/results/ppo.json`.

The same seed, so the same language model and reward model; only the penalty differs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import fmean

from machine import record

RUNS = {
    "adaptive, target 20 nats": [],
    "fixed beta = 5": ["--controller", "fixed", "--kl-coef", "5"],
    "none, beta = 0": ["--controller", "fixed", "--kl-coef", "0"],
}
REPORTED = ("proxy", "gold", "kl", "kl_coef", "entropy", "length")


def run(options: list[str], seed: int, folder: Path) -> dict[str, object]:
    """Means of the first update, of the best gold score's, and over the last third."""
    command = ["kl_kernels", "ppo", "--seed", str(seed), "--out", str(folder), *options]
    subprocess.run([sys.executable, "-m", *command], check=True)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    last_third = records[-len(records) // 3 :]
    return {
        "start": {name: records[0][name] for name in REPORTED},
        "start_proxy_sd": records[0]["proxy_sd"],
        "best_gold": max(r["gold"] for r in records),
        "last_third": {name: fmean(r[name] for r in last_third) for name in REPORTED},
        "updates": len(records),
        "seconds_of_updates": sum(r["seconds"] for r in records),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/ppo.json")
    args = parser.parse_args()
    results = record() | {"seed": args.seed}
    with tempfile.TemporaryDirectory() as directory:
        results["runs"] = {
            name: run(options, args.seed, Path(directory) / str(i))
            for i, (name, options) in enumerate(RUNS.items())
        }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
