"""A run that is killed without a chance to clean up resumes to the same metrics."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from micro import MICRO, run

from kl_kernels.lab.ppo.report import read_metrics
from kl_kernels.monitor.verify import verify_log

REPOSITORY = Path(__file__).parents[3]
REWARD = (
    "def vowels(prompts, answers):\n    return [sum(map(a.count, 'aeiou')) / 4 for a in answers]\n"
)


def killed_after(lines, folder, *arguments):
    """Kill a process some time after so many updates: while it writes, or between."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(REPOSITORY), str(folder)))}
    command = [sys.executable, "-m", "kl_kernels", "ppo", *map(str, arguments)]
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    metrics = folder / "run" / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= lines:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.001)
    assert process.returncode == -signal.SIGKILL, (folder / "output.txt").read_text()


def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path, model_folder, monkeypatch):
    (tmp_path / "of_vowels.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    options = [*MICRO, "--model", model_folder, "--reward", "of_vowels:vowels", "--updates", "12"]
    assert run(*options, "--out", tmp_path / "whole") == 0
    killed_after(2, tmp_path, *options, "--out", tmp_path / "run")
    killed_after(5, tmp_path, "--resume", tmp_path / "run")
    assert verify_log(tmp_path / "run" / "audit.jsonl").problem in (None, "torn tail")
    assert run("--resume", tmp_path / "run") == 0

    whole, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "run"))
    for record in (*whole, *resumed):
        del record["seconds"]
    assert resumed == whole
    assert verify_log(tmp_path / "run" / "audit.jsonl").ok
