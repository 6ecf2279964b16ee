"""`python -m kl_kernels`: what it prints and how it exits."""

import argparse
import dataclasses
import re
import subprocess
import sys

import pytest
import torch

from kl_kernels import __version__
from kl_kernels.backends.dispatch import BACKENDS
from kl_kernels.backends.reference import operators as reference
from kl_kernels.cli import COMMANDS, main
from kl_kernels.lab.ppo.arguments import GROUPS, add_constants
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.validate import errors


def test_info_tells_versions_and_every_backend(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert __version__ in shown
    for name in BACKENDS:
        assert f"[{name}]" in shown
    if not torch.cuda.is_available():
        assert (
            "multiply bfloat16 factors in float32 on cpu: Could not run 'aten::mm.dtype'" in shown
        )


def test_validate_passes_and_prints_eager_beside_ours(capsys):
    assert main(["validate", "--backend", "reference", "cpu", "--vocab-size", "1", "300"]) == 0
    shown = capsys.readouterr().out
    assert "reference: worst error over V = 1, 300" in shown
    assert "late-peak      bfloat16" in shown
    assert "WORSE" not in shown


def test_validate_fails_where_a_backend_is_worse_than_eager(monkeypatch, capsys):
    finish = reference.finish

    def wrong(*args):
        right = finish(*args)
        return right._replace(kl=right.kl * 1.001)

    monkeypatch.setattr(reference, "finish", wrong)
    assert main(["validate", "--backend", "reference", "--vocab-size", "30"]) == 1
    assert "WORSE THAN EAGER random-30-float32: kl is off by" in capsys.readouterr().out


def test_validate_ends_with_its_verdict(monkeypatch, capsys):
    checks = ["validate", "--quick", "--backend", "cpu", "reference"]
    assert main(checks) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    n = int(verdict.split()[1])
    # 19 difficulties in 3 dtypes and 3 mixtures of dtypes, at 2 sizes, on 2 backends.
    assert n % (2 * 2 * (19 * 3 + 3)) == 0
    assert verdict == f"all {n} checks passed on cpu, reference"

    monkeypatch.setattr(errors.Error, "accepted", property(lambda e: e.quantity != "kl"))
    assert main(checks) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith(
        f"{2 * 2 * (19 * 3 + 3)} of {n} checks failed: random-1-float32 kl on"
    )
    assert verdict.endswith("; and 235 more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "--backend", "tpu"], "backend is 'tpu'; accepted: 'triton', 'cuda', 'cpu'"),
        (["validate", "--vocab-size", "0"], "vocab-size is 0; it must be at least 1"),
        (["validate", "--quick", "--vocab-size", "2"], "vocab-size is given, but quick has sizes"),
        (["validate", "--report", "x", "--vocab-size", "2"], "but report has sizes of its own"),
        (["validate", "--commit", "abc"], "commit is 'abc', but only a report records it"),
        (["bench", "--results", "x"], "results is 'x', but only save writes there; add --save"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name, (_, summary) in COMMANDS.items():
        assert f" {name} {summary} " in shown


def test_python_m_runs_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "kl_kernels", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"kl_kernels {__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["tpu"]])
def test_without_a_command_or_with_another_the_commands_are_listed(arguments, capsys):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for name in COMMANDS:
        assert name in captured.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["validate", "--qu"],
        ["validate", "--back", "cpu"],
        ["ppo", "--update", "3"],
        ["--vers"],
        ["audit", "verify", "--js", "audit.jsonl"],
        ["study", "--seq", "4"],
        ["bench", "--li"],
    ],
)
def test_an_option_has_one_name(arguments, capsys):
    """A beginning of it might be another option's tomorrow."""
    assert main(arguments) == 2
    assert "unrecognized arguments" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [[name] for name in COMMANDS] + [["audit", "verify"], ["audit", "show"]]
)
def test_help_is_for_users(arguments, capsys):
    """Every option says what it is for, in words that need no knowledge of the sources."""
    assert main([*arguments, "--help"]) == 0
    shown = capsys.readouterr().out
    for word in ("add_arguments", "module", "namespace", "`", "pytest"):
        assert word not in shown.replace("MODULE:FUNCTION", "").lower()
    options = re.split(r"\n  (?=-|\w)", shown.partition("show this help message")[2])[1:]
    for option in options:
        names, _, text = re.sub(r"\n {10,}", "  ", option).strip().partition("  ")
        assert len(text.split()) >= 2, names


def test_the_constants_of_a_run_are_in_groups(capsys):
    parser = argparse.ArgumentParser()
    add_constants(parser)
    found = {group.title: [a.dest for a in group._group_actions] for group in parser._action_groups}
    assert set(GROUPS.values()) < set(found)
    names = [name for title in GROUPS.values() for name in found[title]]
    assert names == [field.name for field in dataclasses.fields(PPOConfig)]
    for first, title in GROUPS.items():
        assert found[title][0] == first
        assert len(found[title]) <= 15
