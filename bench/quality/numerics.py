"""Runs the numerics report, or takes a finished one (`--resume DIR`), and publishes it.

Its summary becomes `bench/results/numerics.json`, its picture `docs/numerics/numerics.png`;
`bench/readme.py` renders the table.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated: before any import

from kl_kernels.cli import main as command

ROOT = Path(__file__).parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resume", type=Path, metavar="DIR")
    args = parser.parse_args()
    folder = args.resume or Path(tempfile.mkdtemp(prefix="numerics-"))
    if not args.resume and (status := command(["validate", "--report", str(folder)])):
        return status
    report = json.loads((folder / "report.json").read_text())
    if report["breaches"]:
        print("not published, as the gate is broken:", *report["breaches"], sep="\n")
        return 1
    del report["cells"]  # a megabyte: their summary stays
    (ROOT / "bench/results/numerics.json").write_text(json.dumps(report, indent=1) + "\n")
    (ROOT / "docs/numerics").mkdir(exist_ok=True)
    shutil.copy(folder / "numerics.png", ROOT / "docs/numerics")
    return 0


if __name__ == "__main__":
    sys.exit(main())
