"""Random calls with hostile arguments: each gives the truth or an error that names an argument."""

import inspect

from fuzz_calls import FUNCTIONS, call_of
from run import fuzz

import kl_kernels

CALLS = 2000


def test_hostile_calls_give_the_truth_or_a_named_error():
    findings = fuzz(0, CALLS)
    assert not findings, "\n\n".join(findings)


def test_every_public_function_is_called():
    called = {call_of(seed).name for seed in range(CALLS)}
    public = {n for n in kl_kernels.__all__ if inspect.isfunction(getattr(kl_kernels, n))}
    assert public == set(FUNCTIONS) <= called


def test_a_crash_and_a_wrong_answer_are_findings(monkeypatch, tmp_path):
    """The harness itself: workers that see a broken package."""
    (tmp_path / "sitecustomize.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    seeds = [first(name) for name in ("masked_mean", "token_kl")]
    findings = [finding for seed in seeds for finding in fuzz(seed, 1)]
    assert any("ends the process with -6" in f for f in findings)
    assert any("is wrong" in f for f in findings)


def first(name: str) -> int:
    """The first seed of a valid call."""
    seeds = ((seed, call_of(seed)) for seed in range(CALLS))
    return next(seed for seed, call in seeds if call.name == name and not call.changed)


BROKEN = """
import kl_kernels, os
kl_kernels.masked_mean = lambda **_: os.abort()
right = kl_kernels.token_kl
def token_kl(**a):
    r = right(**a)
    return r._replace(kl=r.kl + 0.01)  # a vocabulary of one token has a KL of 0
kl_kernels.token_kl = token_kl
"""
