"""`bench.quality.revisions` sees differences that are there, and none between equals."""

import importlib
import subprocess

import numpy as np
import pytest


@pytest.fixture
def revisions(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    return importlib.import_module("bench.quality.revisions")


def noisy(seed, factor=1.0):
    """A contender whose calls take about a millisecond, with the outliers of a shared machine."""
    generator = np.random.default_rng(seed)

    def ask(op):
        return factor * 1e-3 * generator.lognormal(0, 0.05) * generator.choice([1, 3], p=[0.9, 0.1])

    return ask


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.0, "no difference seen"), (1.3, "slower"), (0.7, "faster"), (1.01, "no difference seen")],
)
def test_a_difference_is_told_from_noise(revisions, factor, verdict):
    contenders = {"base": noisy(1), "new": noisy(2, factor)}
    seconds = revisions.rounds_of(contenders, ["a", "b"], rounds=60)
    for op in ("a", "b"):
        found = revisions.compared(op, seconds[op], threshold=0.03)
        assert found.verdict == verdict, str(found)
        assert found.low <= found.ratio <= found.high
        assert found.ratio == pytest.approx(factor, rel=0.05)


def test_two_identical_contenders_do_not_differ(revisions):
    seconds = revisions.rounds_of({"base": lambda op: 1e-3, "new": lambda op: 1e-3}, ["a"], 10)
    found = revisions.compared("a", seconds["a"], threshold=0.0)
    assert (found.ratio, found.low, found.high, found.verdict) == (1, 1, 1, "no difference seen")


def test_contenders_take_turns_and_change_who_is_first(revisions):
    asked = []

    def contender(name):
        def ask(op):
            asked.append((op, name))
            return 1e-3

        return ask

    revisions.rounds_of({name: contender(name) for name in ("base", "new")}, ["a", "b"], 2)
    warm = [("a", "base"), ("a", "new"), ("b", "base"), ("b", "new")]
    assert asked[:4] == warm
    assert sorted(asked[4:8]) == sorted(asked[8:]) == sorted(warm)
    assert [name for _, name in asked[4:8]] == ["new", "base"] * 2
    assert [name for _, name in asked[8:]] == ["base", "new"] * 2


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.5, 1), (0.5, 0)])
def test_the_exit_code_is_about_what_is_slower(revisions, capsys, factor, code):
    seconds = revisions.rounds_of({"base": noisy(1), "new": noisy(2, factor)}, ["op"], 40)
    assert revisions.report([revisions.compared("op", seconds["op"], 0.03)]) == code
    assert "95 % interval" in capsys.readouterr().out


def test_a_worker_runs_the_package_of_its_tree(revisions, request):
    with revisions.Worker(request.config.rootpath, threads=1) as worker:
        (op,) = [op for op in worker.ops if op.startswith("compute_gae")]
        assert 0 < worker(op) < 10


def test_a_package_from_elsewhere_is_refused(revisions, tmp_path, request, monkeypatch):
    monkeypatch.syspath_prepend(str(request.config.rootpath))
    with pytest.raises(RuntimeError, match=f"not from {tmp_path}"):
        revisions.serve(str(tmp_path))


def test_an_unknown_revision_is_one_sentence(revisions, capsys):
    assert revisions.main(["--base", "no-such-revision"]) == 2
    assert capsys.readouterr().err.startswith("error: git rev-parse")


def test_a_worktree_is_gone_afterwards(revisions, tmp_path, monkeypatch):
    def git(*args):
        subprocess.run(["git", "-C", tmp_path, *args], check=True, capture_output=True)

    git("init", "-q")
    (tmp_path / "setup.py").write_text("open('built', 'w').close()\n")
    git("add", "setup.py")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "Build")
    monkeypatch.setattr(revisions, "ROOT", tmp_path)
    with revisions.checked_out("HEAD") as tree:
        assert (tree / "built").exists()
        assert not (tmp_path / "built").exists()
    assert not tree.exists()
    assert revisions.git("worktree", "list").count("\n") == 0
