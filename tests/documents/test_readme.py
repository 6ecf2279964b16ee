"""Figures in README.md and docs/ are those of the committed results files."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_documents_say_what_the_results_files_say():
    done = subprocess.run(
        [sys.executable, "-m", "bench.readme", "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, "run `python -m bench.readme`"
