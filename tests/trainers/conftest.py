"""Tests beside the trainers themselves, each in an environment of its own; see `make integrations`.

A test says by a marker what it exercises:

    @pytest.mark.exercises("GRPO: two steps")

What passed is written to build/trainers/<environment>.json, of which `compatibility.py` makes the
compatibility matrix.
"""

import json
import os
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest

os.environ |= {
    "ACCELERATE_USE_CPU": "true",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "WANDB_MODE": "disabled",
}

HERE = Path(__file__).parent
PASSED = pytest.StashKey[Counter]()
# Packages whose versions are recorded.
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "peft", "tensordict", "ray")


def pytest_configure(config):
    config.addinivalue_line("markers", "exercises(what): what of a trainer a test exercises")
    config.stash[PASSED] = Counter()


def pytest_collection_modifyitems(items):
    silent = [item.nodeid for item in items if item.get_closest_marker("exercises") is None]
    if silent:
        raise pytest.UsageError(f"tests that do not say what they exercise: {silent}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.when == "call" and report.passed:
        for marker in item.iter_markers("exercises"):
            item.config.stash[PASSED][marker.args[0]] += 1
    return report


def pytest_sessionfinish(session, exitstatus):
    """Write the record of a complete, green run of one environment."""
    folders = {item.path.relative_to(HERE).parts[0] for item in session.items}
    if exitstatus != pytest.ExitCode.OK or len(folders) != 1:
        return
    environment = folders.pop()
    trainer = environment.rpartition("-")[0]
    record = {
        "trainer": trainer,
        "version": metadata.version(trainer),
        "packages": {p: version for p in PACKAGES if (version := _version(p)) is not None},
        "exercised": dict(sorted(session.config.stash[PASSED].items())),
    }
    target = session.config.rootpath / "build" / "trainers" / f"{environment}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
