"""The compiled libraries need nothing of torch but its stable C ABI, and nothing of Python.

That is what lets one wheel serve every torch from 2.11 and every Python from 3.10 on.
"""

import subprocess

import pytest

from kl_kernels.backends import compiled as native

BUILT = [name for name in ("cpu", "cuda") if native.library_path(name).exists()]
STABLE = ("aoti_torch_", "torch_")
LINKERS = ("_ITM_", "__gmon_start__")  # asked for by every shared library, and found by none


def test_the_cpu_library_is_built():
    assert "cpu" in BUILT


@pytest.mark.parametrize("name", BUILT)
def test_only_the_stable_abi_is_linked(name):
    command = ["nm", "-D", "--undefined-only", native.library_path(name)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    symbols = {line.split()[-1] for line in listing.splitlines()}
    assert "aoti_torch_library_init_impl" in symbols
    # The system's libraries name the version of each symbol ("malloc@GLIBC_2.2.5").
    foreign = {s for s in symbols if "@" not in s and not s.startswith(LINKERS)}
    assert {s for s in foreign if not s.startswith(STABLE)} == set()
