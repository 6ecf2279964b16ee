"""Runs the study of KL penalties, or takes a finished one (`--resume DIR`), and publishes it.

Its numbers become `bench/results/study.json`, its pictures `docs/study/*.png`; `bench/readme.py`
renders the rest. `--draw` draws the pictures of the published numbers anew.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from bench.common.machine import record
from kl_kernels.lab.study import arguments, command
from kl_kernels.lab.study.report import draw

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "study.json"
PICTURES = ROOT / "docs" / "study"


def rounded(value: Any) -> Any:
    """Five digits of every number: curves are as long as the runs, and are only drawn."""
    if isinstance(value, dict):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def as_text(results: dict[str, Any]) -> str:
    """JSON with each list of numbers on one line."""
    text = json.dumps(results, indent=1) + "\n"
    return re.sub(r"\[[-+\d.e,\s]+\]", lambda found: " ".join(found[0].split()), text)


def published(data: dict[str, Any]) -> dict[str, Any]:
    """The study's data, with rounded curves."""
    drawn = {name: rounded(data[name]) for name in ("curves", "overoptimisation")}
    return data | drawn


def publish_pictures(results: dict[str, Any]) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    for old in PICTURES.glob("*.png"):
        old.unlink()
    for name, png in draw(results).items():
        (PICTURES / f"{name}.png").write_bytes(png)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="only draw what is published")
    arguments.add_arguments(parser)
    args = parser.parse_args()
    if args.draw:
        publish_pictures(json.loads(RESULTS.read_text()))
        return 0
    facts = record()
    status, study = command.conduct(args)
    if status:
        return status
    results = facts | published(json.loads(study.data.read_text()))
    RESULTS.write_text(as_text(results))
    publish_pictures(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
