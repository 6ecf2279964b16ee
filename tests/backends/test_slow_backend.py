"""Plain PyTorch is never taken without a word: one warning per process and reason."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kl_kernels.backends import dispatch

ROOT = Path(__file__).parents[2]
NOT_BUILT = (
    "kl_kernels: cpu tensors run in plain PyTorch in float64, 14 times slower or more: backend "
    "'cpu' is not built (in a checkout: pip install --no-build-isolation -e .)"
)
FLOAT64 = "kl_kernels: float64 tensors run in plain PyTorch, 14 times slower or more"
SILENCED = 'backend="reference" asks for this, without a warning'
PROGRAM = """
import torch
import kl_kernels

logits, ids = torch.randn(3, 40), torch.tensor([1, 2, 3])
for x in ({dtypes}):
    x = logits.to(x).requires_grad_()
    for _ in range(3):
        out = {call}  # here
        (out.logprob.sum() + out.entropy.sum()).backward()
    kl_kernels.compute_gae(x, x, torch.ones_like(x), {options})
"""
CALL = "kl_kernels.token_stats(x, ids, {})"


@pytest.fixture(scope="module")
def unbuilt(tmp_path_factory):
    """A checkout as it is cloned, without compiled libraries."""
    tree = tmp_path_factory.mktemp("clone")
    without = shutil.ignore_patterns("*.so", "*.unavailable", "__pycache__")
    shutil.copytree(ROOT / "kl_kernels", tree / "kl_kernels", ignore=without)
    return tree


def warnings_of(tree, dtypes="torch.float32, torch.bfloat16", options="", call=CALL):
    """The warnings that a program prints, as (line of the program, message)."""
    program = tree / "program.py"
    source = PROGRAM.format(dtypes=dtypes, options=options, call=call.format(options))
    program.write_text(source)
    done = subprocess.run(
        [sys.executable, program],
        env=os.environ | {"PYTHONPATH": str(tree if (tree / "kl_kernels").exists() else ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = source.splitlines()
    told = [line for line in done.stderr.splitlines() if "Warning: " in line]
    for line in told:
        assert line.startswith(f"{program}:"), line
    return [
        (lines[int(line.split(":")[1]) - 1].strip(), line.partition("UserWarning: ")[2])
        for line in told
    ]


def test_a_tree_that_is_not_built_says_so_once_where_it_is_called(unbuilt):
    ((line, message),) = warnings_of(unbuilt)
    assert line.endswith("# here")
    assert message.startswith(NOT_BUILT)
    assert f"imported from {unbuilt / 'kl_kernels'}" in message
    assert message.endswith(SILENCED)


def test_float64_says_so_once_where_it_is_called(unbuilt, tmp_path):
    for tree in (unbuilt, tmp_path):
        ((line, message),) = warnings_of(tree, dtypes="torch.float64,")
        assert line.endswith("# here")
        assert message.startswith(FLOAT64)
        assert message.endswith(SILENCED)


def test_each_reason_is_told_once(unbuilt):
    told = warnings_of(unbuilt, dtypes="torch.float64, torch.float32, torch.float64")
    assert [message[:20] for _, message in told] == [FLOAT64[:20], NOT_BUILT[:20]]


def test_compiled_code_names_the_callers_line_too(unbuilt):
    compiled = "torch.compile(lambda x: kl_kernels.token_stats(x, ids), backend='aot_eager')(x)"
    ((line, message),) = warnings_of(unbuilt, call=compiled)
    assert line.endswith("# here")
    assert message.startswith(NOT_BUILT)


def test_nothing_is_told_where_the_extension_is_built_or_the_backend_asked_for(unbuilt, tmp_path):
    assert warnings_of(tmp_path) == []
    every = "torch.float32, torch.float64"
    assert warnings_of(unbuilt, dtypes=every, options="backend='reference'") == []


def test_devices_without_any_kernels_are_told_of_as_well():
    with pytest.warns(UserWarning, match="xpu tensors run in plain .*: no other backend takes"):
        dispatch._warn_of_reference("xpu", float64=False)


def test_a_gpu_without_triton_is_told_why(monkeypatch):
    missing = {name: dispatch.Backend(dict, lambda: "is not there", ("cuda",)) for name in "ab"}
    last = {"reference": dispatch.BACKENDS["reference"]}
    monkeypatch.setattr(dispatch, "BACKENDS", missing | last)
    dispatch._choose.cache_clear()
    with pytest.warns(UserWarning, match="backend 'a' is not there; backend 'b' is not there"):
        dispatch._choose(None, "cuda", False)
    dispatch._choose.cache_clear()
