"""The names of `dir(kl_kernels)`: the contract, and nothing that an import left behind."""

import subprocess
import sys

import kl_kernels


def test_dir_shows_the_public_names_and_nothing_else():
    shown = {name for name in dir(kl_kernels) if not (name[:2] == name[-2:] == "__")}
    assert shown == set(kl_kernels.__all__) - {"__version__"}
    assert "linear_token_kl" in shown
    assert "__version__" in dir(kl_kernels)


def test_every_name_that_dir_shows_can_be_had():
    for name in dir(kl_kernels):
        getattr(kl_kernels, name)


def test_dir_is_the_same_before_and_after_a_linear_head_is_asked_for():
    program = (
        "import kl_kernels; before = dir(kl_kernels); kl_kernels.linear_token_stats; "
        "import kl_kernels.lab.codegen; assert dir(kl_kernels) == before == sorted(before)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
