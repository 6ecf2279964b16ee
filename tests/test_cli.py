"""`python -m kl_kernels`: what it prints and how it exits."""

import subprocess
import sys

import pytest

from kl_kernels import __version__, reference
from kl_kernels.cli import COMMANDS, main
from kl_kernels.dispatch import BACKENDS


def test_info_tells_versions_and_every_backend(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert __version__ in shown
    for name in BACKENDS:
        assert f"[{name}]" in shown


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "--backend", "tpu"], "backend is 'tpu'; accepted: 'triton', 'cuda', 'cpu'"),
        (["validate", "--vocab-size", "0"], "vocab-size is 0; it has to be at least 1"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_exit_code_2(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_lists_the_commands():
    done = subprocess.run(
        [sys.executable, "-m", "kl_kernels", "--help"], capture_output=True, text=True, check=True
    )
    for name, (_, summary) in COMMANDS.items():
        assert name in done.stdout
        assert summary.split()[0] in done.stdout
