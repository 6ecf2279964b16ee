"""The compatibility matrix: which trainers, at which versions, and what of them was exercised.

python tests/trainers/compatibility.py          # write it from what make integrations ran
python tests/trainers/compatibility.py --check  # exit 1 where it does not say what was run
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RUN = ROOT / "build" / "trainers"
MATRIX = ROOT / "bench" / "results" / "compatibility.json"


def main(argv: list[str]) -> int:
    run = {path.stem: json.loads(path.read_text()) for path in sorted(RUN.glob("*.json"))}
    committed: dict[str, Any] = json.loads(MATRIX.read_text()) if MATRIX.exists() else {}
    if argv == ["--check"]:
        stale = [name for name, record in run.items() if told(record) != told(committed.get(name))]
        for name in stale:
            print(f"{MATRIX.name} does not say what was run of {name}: run `make integrations`")
        return bool(stale or not run)
    MATRIX.write_text(json.dumps(committed | run, indent=1, sort_keys=True) + "\n")
    return 0


def told(record: dict[str, Any] | None) -> Any:
    """Return the fields that must be equal; the packages beside a trainer may change."""
    return record and (record["trainer"], record["version"], record["exercised"])


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
