"""Mutation testing of the core: `bench/results/mutants.json`.

mutmut changes one expression at a time and runs the tests that reach it; what no test notices has
survived. Which files and which tests: `[tool.mutmut]` in pyproject.toml. It works on a copy below
build/, where it remembers what it has done; a run that is stopped goes on where it was.

python -m bench.quality.mutants                            # everything
python -m bench.quality.mutants "kl_kernels.algebra.row*"      # some mutants, by name
python -m bench.quality.mutants --collect                  # write down what has been run so far
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.common.machine import record

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results" / "mutants.json"
WORK = ROOT / "build" / "mutation"
PACKAGE = "kl_kernels"


def stage() -> None:
    """The files of this tree beside what mutmut knows of earlier runs."""
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / "record.json").write_text(json.dumps(record()))
    shutil.copy(ROOT / "pyproject.toml", WORK)
    for tree in (PACKAGE, "tests"):
        shutil.rmtree(WORK / tree, ignore_errors=True)
        shutil.copytree(ROOT / tree, WORK / tree, ignore=shutil.ignore_patterns("__pycache__"))


def run(names: list[str], children: int) -> None:
    """Mutate and see which tests reach what, by mutmut; then run them, by `mutants_pytest`."""
    # Threads of torch do not survive a fork.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    # mutmut fails for want of such a mutant, after all that is wanted of it.
    mutate = [sys.executable, "-m", "mutmut", "run", "no mutant has this name"]
    with open(WORK / "mutmut.log", "w") as log:
        subprocess.run(mutate, cwd=WORK, env=environment, stdout=log, stderr=log, check=False)
    if "nothing matches" not in Path(log.name).read_text():
        raise SystemExit(f"mutmut did not come to its end: {log.name}")
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(WORK / "mutants"), os.environ.get("PYTHONPATH", "")]
    )
    test = [sys.executable, Path(__file__).with_name("mutants_pytest.py"), str(children), *names]
    subprocess.run(test, cwd=WORK, env=environment, check=True)


def collect() -> dict[str, Any]:
    """Counts per module, of modules that have been begun, and what survived."""
    os.chdir(WORK)  # mutmut finds its files from here
    from mutmut.mutation.diff_apply import get_diff_for_mutant
    from mutmut.stats import status_by_exit_code

    modules, survivors = {}, []
    for meta in sorted(Path("mutants", PACKAGE).rglob("*.py.meta")):
        statuses = {
            name: status_by_exit_code[code]
            for name, code in json.loads(meta.read_text())["exit_code_by_key"].items()
        }
        found = list(statuses.values())
        if not set(found) - {"not checked"}:
            continue
        module = str(meta.relative_to(Path("mutants", PACKAGE))).removesuffix(".meta")
        modules[module] = {s: found.count(s) for s in sorted(set(found))}
        for name, status in statuses.items():
            if status not in ("killed", "timeout", "not checked"):
                lines = get_diff_for_mutant(name).splitlines()[3:]
                survivors.append(
                    {
                        "module": module,
                        "name": name.rpartition(".")[2],
                        "status": status,
                        "old": [line[1:].strip() for line in lines if line.startswith("-")],
                        "new": [line[1:].strip() for line in lines if line.startswith("+")],
                    }
                )
    return {"mutmut": version("mutmut"), "modules": modules, "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help="mutants, with wildcards (default: all)")
    parser.add_argument("--children", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--collect", action="store_true", help="run nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.collect:
        stage()
        run(args.names, args.children)
    results = json.loads((WORK / "record.json").read_text()) | collect()
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
