"""The GPU backends' kernels, run as the PTX for two architectures: right, and without a fault.

Each in a process of its own, in which Triton compiles. `make machine` runs more of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_small_cases_are_right_and_without_faults(arch, backend):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu/test_gpu_small_cases.py"]
    options = ["-p", "no:cacheprovider", "-p", "no:xdist", "--machine", arch, "--backend", backend]
    result = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert result.returncode == 0, result.stdout
