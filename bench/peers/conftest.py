"""Options of `make bench`, and the results that its tests collect."""

from __future__ import annotations

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.common.machine import chip_name, gpu_record, record
from bench.gpu.ceilings import ceilings
from bench.peers.compare import DEVICE, benchmarks, name_of
from bench.peers.versions import peer_versions

RESULTS = Path(__file__).parents[1] / "results"
CEILING_BYTES = 1 << 29


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all sizes: hours on a CPU")
    parser.addoption("--only", default="", help="those whose name contains this text")
    parser.addoption("--save", action="store_true", help="write bench/results/peers.json")
    parser.addoption("--results", type=Path, default=RESULTS, help="directory that is written to")
    parser.addoption("--seconds", type=float, default=math.inf, help="nothing starts later")
    parser.addoption("--commit", help="where the files are not in a git repository")
    parser.addoption("--threads", type=int, default=2, help="of the CPU")


def pytest_configure(config: pytest.Config) -> None:
    only = config.getoption("--only")
    if not benchmarks(config.getoption("--full"), only):
        raise pytest.UsageError(f"only is {only!r}, which no benchmark's name contains; see --list")


class Collected:
    """One results file: the machine's facts, measurements, and who was not measured and why."""

    def __init__(self, config: pytest.Config):
        about = gpu_record() if DEVICE == "cuda" else record()
        about["commit"] = config.getoption("--commit") or about["commit"]
        self.saving = config.getoption("--save")
        self.directory: Path = config.getoption("--results")
        self.end = time.monotonic() + config.getoption("--seconds")
        options = " ".join(name for name in ("--full", "--save") if config.getoption(name))
        about["command"] = f"make bench ARGS='{options}'" if options else "make bench"
        read = max(ceilings(DEVICE, CEILING_BYTES)["read"].values())
        self.read_bytes_per_s = read
        self.results: dict[str, Any] = about | {
            "kind": DEVICE,
            "peers": peer_versions(),
            "read_gb_per_s": round(read / 1e9, 2),
            "measurements": [],
            "not_measured": [],
        }

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.end

    def add(self, row: dict[str, Any]) -> None:
        rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
        self.results["measurements"].append(rounded)
        if self.saving:  # a run that is cut short has not been for nothing
            self.save()

    def leave_out(self, operation: str, contender: str, reason: str) -> None:
        entry = {"operation": operation, "contender": contender, "reason": reason}
        if entry not in self.results["not_measured"]:
            self.results["not_measured"].append(entry)

    def save(self) -> Path:
        name = "peers" if DEVICE == "cpu" else f"peers_{chip_name(self.results['device'])}"
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{name}.json"
        path.write_text(json.dumps(self.results, indent=1) + "\n")
        return path


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> Collected:
    torch.set_num_threads(request.config.getoption("--threads"))
    request.config.stash[KEY] = made = Collected(request.config)
    return made


KEY = pytest.StashKey[Collected]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The columns that pytest-benchmark has no place for."""
    made = config.stash.get(KEY, None)
    if made is None:
        return
    write = terminalreporter.write_line
    found = made.results
    write(f"{found['device']}, reads {found['read_gb_per_s']} GB/s, torch {torch.__version__}")
    names = [
        name_of(f"{m['operation']}, {m['size']}, {m['dtype']}", m["contender"])
        for m in found["measurements"]
    ]
    width = max(map(len, names), default=0)
    write(
        f"{'':{width}}{'ms':>9}{'x ours':>8}{'GB/s':>7}{'of read':>8}{'MB':>7}{'faults':>8}"
        f"{'error':>9}"
    )
    for name, m in zip(names, found["measurements"]):
        rate = f"{m['gb_per_s']:7.1f}{m['share']:8.0%}" if m["share"] else f"{'':15}"
        error = m.get("gradient_error", m["value_error"])
        write(
            f"{name:{width}}{m['median_ms']:9.2f}{m['ratio']:8.2f}{rate}{m['extra_mb']:7.0f}"
            f"{m['page_faults']:8.0f}{error:9.1e}"
        )
    for entry in found["not_measured"]:
        write(f"not measured: {entry['contender']}, {entry['operation']}: {entry['reason']}")
    if made.saving:
        write(f"written to {made.save()}; python -m bench.readme renders it")


def median_of_pairs(times: list[float], ours: list[float]) -> float:
    """Divide a contender's times by ours of the same round: drift is shared."""
    return statistics.median(t / o for t, o in zip(times, ours))
