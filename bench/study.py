"""Runs the study of KL penalties, or takes a finished one (`--resume DIR`), and publishes it.

Its numbers become `bench/results/study.json`, its pictures `docs/study/*.png`; `bench/readme.py`
renders the rest.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from machine import record

from kl_kernels.study import arguments, command

ROOT = Path(__file__).parent.parent


def published(data: dict[str, Any]) -> dict[str, Any]:
    """Without the curves, which are in the pictures."""
    kept = {name: value for name, value in data.items() if name != "curves"}
    if kept["overoptimisation"]:
        points = ("kl", "proxy", "gold")
        kept["overoptimisation"] = {
            name: value for name, value in kept["overoptimisation"].items() if name not in points
        }
    return kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    arguments.add_arguments(parser)
    facts = record()
    status, study = command.conduct(parser.parse_args())
    if status:
        return status
    results = facts | published(json.loads(study.data.read_text()))
    (ROOT / "bench/results/study.json").write_text(json.dumps(results, indent=1) + "\n")
    pictures = ROOT / "docs" / "study"
    shutil.rmtree(pictures, ignore_errors=True)
    pictures.mkdir(parents=True)
    for path in sorted(study.path.glob("*.png")):
        shutil.copy(path, pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
