"""The hosted workflow runs what a change must pass, on the oldest Python that is promised."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def test_the_workflow_runs_the_checks_on_the_oldest_python_and_builds_the_wheel():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    commands = {name: [step.get("run") for step in job["steps"]] for name, job in jobs.items()}
    assert ".ci/run" in commands["check"]
    assert "make wheel" in commands["wheel"]
    pythons = jobs["check"]["strategy"]["matrix"]["python"]
    project = (ROOT / "pyproject.toml").read_text()
    assert f'requires-python = ">={pythons[0]}"' in project
    assert "wheel:" in (ROOT / "Makefile").read_text()
