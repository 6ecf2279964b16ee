"""Records which lines the tests ran, as `make coverage` has just measured it.

From build/coverage/{commit,python.json,cpp.json} to `bench/results/coverage.json`, by folder;
`bench/readme.py` renders the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.common.machine import record

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "build" / "coverage"


def python_files() -> Iterable[tuple[str, int, int]]:
    """Each file, its lines that can run, and how many did."""
    files = json.loads((MEASURED / "python.json").read_text())["files"]
    for name, found in files.items():
        path = "kl_kernels/" + name.partition("kl_kernels/")[2]
        yield path, found["summary"]["num_statements"], found["summary"]["covered_lines"]


def cpp_files() -> Iterable[tuple[str, int, int]]:
    for found in json.loads((MEASURED / "cpp.json").read_text())["files"]:
        yield found["filename"], found["line_total"], found["line_covered"]


def by_folder(files: Iterable[tuple[str, int, int]]) -> dict[str, dict[str, int]]:
    folders: dict[str, dict[str, int]] = {}
    for path, lines, covered in sorted(files):
        of = folders.setdefault(str(Path(path).parent), {"lines": 0, "covered": 0})
        of["lines"] += lines
        of["covered"] += covered
    return folders


def main() -> None:
    folders = {"Python": by_folder(python_files()), "C++": by_folder(cpp_files())}
    commit = (MEASURED / "commit").read_text().strip()  # the copied tree's
    results: dict[str, Any] = {"folders": folders, **record(), "commit": commit}
    path = ROOT / "bench" / "results" / "coverage.json"
    path.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
