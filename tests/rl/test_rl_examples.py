"""The examples in docstrings of controllers, rewards, scores, advantages and masked means."""

import doctest
import importlib

import pytest

MODULES = {
    "adaptive_controllers": 3,
    "advantages": 1,
    "controllers": 1,
    "early_stop": 1,
    "group_advantages": 1,
    "masked": 3,
    "rewards": 1,
    "scores": 3,
}


@pytest.mark.parametrize("module", MODULES)
def test_examples_run_as_they_are_printed(module):
    found = importlib.import_module(f"kl_kernels.rl.{module}")
    examples = [test for test in doctest.DocTestFinder().find(found) if test.examples]
    assert len(examples) == MODULES[module]
    result = doctest.testmod(found)
    assert result.attempted > 0
    assert result.failed == 0
