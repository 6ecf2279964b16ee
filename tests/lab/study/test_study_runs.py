"""A study loses nothing, whatever stops it, and its runs are what they would be on their own."""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from kl_kernels.lab.ppo.checkpoint import RunFolder
from kl_kernels.lab.ppo.report import read_metrics
from kl_kernels.lab.study import command, runs
from kl_kernels.lab.study.arguments import add_arguments
from kl_kernels.lab.study.plan import Plan, StudyFolder

ROOT = Path(__file__).parents[3]
MICRO = [
    *("--batch-size", "8", "--minibatches", "2", "--answer-tokens", "6", "--prompt-tokens", "3"),
    *("--reward-pairs", "12", "--reward-epochs", "1", "--kl-horizon", "16", "--seed", "3"),
    *("--hidden-size", "8", "--layers", "1", "--vocab-size", "400", "--pretrain-steps", "3"),
    *("--updates", "16"),
]


def study(*arguments: str | Path) -> int:
    return command.run(parse(*arguments))


def parse(*arguments: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(map(str, arguments)))


def metrics(run):
    records = read_metrics(run.metrics)
    assert all(record.pop("seconds") > 0 for record in records)
    return records


def contents(folder: Path) -> dict[Path, tuple[int, str]]:
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def children(monkeypatch):
    """Every process a study starts, with the package found from anywhere."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    started: list[subprocess.Popen] = []
    popen = subprocess.Popen

    class Listed(popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(runs.subprocess, "Popen", Listed)
    return started


def test_a_study_that_is_stopped_twice_has_the_metrics_of_lone_runs(
    tmp_path, children, monkeypatch, capsys
):
    """Stopped by Ctrl-C while preparing, then a child by kill -9 in the middle of its run."""
    monkeypatch.setattr(runs, "n_cores", lambda: 1)  # sums are rounded by the number of threads
    out, folder = tmp_path / "study", StudyFolder(tmp_path / "study")
    alone = ["ppo", *MICRO, "--controller", "fixed", "--kl-coef", "0", "--out", tmp_path / "ppo"]
    lone = subprocess.Popen(
        [sys.executable, "-m", "kl_kernels", *map(str, alone)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    def ctrl_c(process):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_wait", ctrl_c)
        arguments = ["--betas", "0.00,adaptive", "--seeds", "1", "--sequences", "8"]
        assert study(*MICRO, *arguments, "--out", out, "--jobs", "2") == 130
    assert f"study --resume {out}" in capsys.readouterr().out
    assert all(child.poll() is not None for child in children[1:])

    killed = folder.run("0", 3)

    def kill_in_the_middle(process):
        if killed.metrics.is_file() and b"\n" in killed.metrics.read_bytes():
            os.kill(children[-2].pid, signal.SIGKILL)
        time.sleep(0.01)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_wait", kill_in_the_middle)
        assert study("--resume", out, "--jobs", "2") == 1
    error = capsys.readouterr().err
    assert "beta-0-seed-3 ended with status -9; the end of its log" in error
    assert f"study --resume {out}" in error
    assert all(child.poll() is not None for child in children[1:])
    assert 1 <= len(read_metrics(killed.metrics)) < 16

    assert study("--resume", out, *MICRO, "--betas", "0,adaptive") == 0, "its own constants"
    assert lone.wait(60) == 0
    assert metrics(killed) == metrics(RunFolder(tmp_path / "ppo"))

    assert "reward model:" in folder.log(folder.start(3)).read_text()
    assert "reward model:" not in folder.log(killed).read_text(), "runs of a seed share its start"

    printed = capsys.readouterr().out
    assert str(folder.report) in printed
    assert "adaptive beta" in printed
    assert json.loads(folder.data.read_text())["seeds"] == [3]
    assert folder.report.read_text().count("<img") == len(list(out.glob("*.png"))) == 4

    before, n_children = contents(out / "runs") | contents(out / "starts"), len(children)
    assert study("--resume", out) == 0
    assert contents(out / "runs") | contents(out / "starts") == before, "nothing is done twice"
    assert len(children) == n_children
    assert not list(out.rglob("*.partial"))


def test_the_bar_says_how_far_a_start_is_that_has_no_updates_yet(tmp_path):
    """The last bar of a log that a tqdm writes, in the words of `pretrain` and `sample_answers`."""
    plan = Plan(command.PPOConfig(), betas=("0",), n_seeds=1)
    study = command.create_study(tmp_path / "study", plan)
    start, run = runs.jobs_of(plan, study)
    assert runs._said(start) == "seed-0"
    with open(start.log, "w") as log:
        print("pretraining a Llama of 14,672 parameters on 140,766 tokens", file=log)
        for desc, n, total in (
            ("pretraining", 300, 300),
            ("Loading", 2, 20),
            ("preferences", 7, 9),
        ):
            tqdm(total=total, initial=n, desc=desc, unit="x", file=log, mininterval=0).close()
            log.flush()
            expected = {"pretraining": "pretraining 300/300", "preferences": "preferences 7/9"}
            said = expected.get(desc, "pretraining 300/300")
            assert runs._said(start) == f"seed-0 ({said})"
        print("Traceback " * 1000, file=log)
    assert runs._said(start) == "seed-0"
    assert runs._said(run) == "beta-0-seed-0"
    run.log.write_text("preferences:  10%|#   | 1/10 [00:00<?]\n")
    run.folder.path.mkdir()
    run.folder.metrics.write_text("{}\n")
    assert runs._said(run) == "beta-0-seed-0"


def test_jobs_share_the_cores(monkeypatch, tmp_path):
    environments = []
    monkeypatch.setattr(
        runs.subprocess, "Popen", lambda *_, env, **__: environments.append(env["OMP_NUM_THREADS"])
    )
    monkeypatch.setattr(runs, "n_cores", lambda: 4)
    job = runs.Job(
        StudyFolder(tmp_path).run("0", 0), tmp_path / "log", ("x",), bool, bool, lambda: None
    )
    for side_by_side in (1, 2, 3, 4, 8):
        runs._launch(job, side_by_side, None)
    assert environments == ["4", "2", "1", "1", "1"]


def test_two_studies_in_one_folder_are_refused(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    folder = command.create_study(tmp_path / "study", Plan(command.PPOConfig()))
    with open(folder.lock, "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="is in use"):
            study("--resume", folder.path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betas", "0,x"], "betas holds 'x'; accepted: numbers from 0 on, and 'adaptive'"),
        (["--betas", "-1"], "betas holds '-1'"),
        (["--betas", "0.1,0.10"], "betas is '0.1,0.1'; each must be there once"),
        (["--seeds", "0"], "seeds is 0"),
        (["--jobs", "0"], "jobs is 0"),
        (["--sequences", "1"], "sequences is 1"),
        (["--controller", "fixed"], "controller is 'fixed', which betas says"),
        (["--reward", "m:f"], "reward is 'm:f'; a study compares"),
        (["--model", "no/such/folder"], "model is 'no/such/folder'"),
        (["--kl-coef", "0"], "kl_coef is 0, which cannot adapt"),
        (["--resume", "no/such/study"], "resume is 'no/such/study', which holds no study"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_leaves_no_folder(tmp_path, arguments, message):
    out = [] if "--resume" in arguments else ["--out", tmp_path / "study"]
    with pytest.raises(ValueError, match="^" + message) as error:
        study(*arguments, *out)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "study").exists()


def test_a_folder_that_exists_is_refused_and_so_is_another_plan(tmp_path):
    folder = command.create_study(tmp_path / "study", Plan(command.PPOConfig()))
    with pytest.raises(ValueError, match=r"already exists.*--resume"):
        study("--out", folder.path)
    for changed in (["--seeds", "2"], ["--betas", "0"], ["--updates", "7"], ["--out", "x"]):
        with pytest.raises(ValueError, match="as it was planned"):
            study("--resume", folder.path, *changed)


def test_a_plan_survives_its_file():
    plan = Plan(command.PPOConfig(seed=4, updates=7), betas=("0.10", "adaptive"), n_seeds=2)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.betas == ("0.1", "adaptive")
    assert list(plan.seeds) == [4, 5]
    assert plan.n_updates == 28
    assert plan.config("0.1", 5).controller == "fixed"
    assert plan.config("0.1", 5).kl_coef == 0.1
    assert plan.config("adaptive", 5).kl_coef == plan.constants.kl_coef
