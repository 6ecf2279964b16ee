"""Without a GPU, Triton kernels run interpreted; uninitialised memory is NaN in every test."""

import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings

# Folders with helpers, and with cases that other tests ask more backends about.
SHARED = ("algebra", "backends", "functional", "fuzz", "gpu")
sys.path[:0] = [str(Path(__file__).with_name(folder)) for folder in SHARED]

# The same examples in every run; `pytest --hypothesis-profile=default` looks for new ones.
settings.register_profile("repeatable", deadline=None, derandomize=True)
# Without the search for the smallest failing example.
settings.register_profile(
    "unshrunk", deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
)
settings.load_profile("repeatable")


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        help="backends tests/gpu runs on (default: triton, cuda); cpu tries the tests themselves",
    )
    parser.addoption(
        "--machine",
        metavar="ARCH",
        help="run tests/gpu without a GPU, on the PTX for one of these: sm_80, sm_90, sm_100",
    )
    parser.addoption(
        "--approximation",
        default="exact",
        choices=("exact", "up", "down", "hash"),
        help="for --machine: results of approximate instructions, within their bounds",
    )
    parser.addoption(
        "--launches",
        default="production",
        choices=("production", "small"),
        help="for --machine: launch policies of the cuda backend",
    )


def pytest_configure(config):
    if config.getoption("--machine"):
        config.pluginmanager.import_plugin("machine.plugin")
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated: before any import


def pytest_ignore_collect(collection_path, config):
    """Leave out tests/gpu without a GPU: its tests are neither skipped nor green then."""
    elsewhere = config.getoption("--machine") or config.getoption("--backend") == ["cpu"]
    if collection_path.name == "gpu" and not torch.cuda.is_available() and not elsewhere:
        return True
    return None


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """`torch.empty` fills with NaN in deterministic mode: an unwritten output fails its test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="session")
def _mend_interpreter():
    """Make Triton's interpreter round as GPUs do, and an order of magnitude faster.

    To bfloat16 it truncates, where GPUs round to nearest even. It patches the language anew in
    every call of a device function, where once per module is enough. And its time goes by
    operations, not by elements, so tiles are wide.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton.runtime import interpreter

    from kl_kernels.backends.triton import launch

    wide = dataclasses.replace(
        launch.CONFIG, lanes=512, steps=1, unaligned_steps=1, scale_programs=8
    )
    convert = interpreter._convert_float
    patched = set()

    def round_to_bfloat16(x, source, target, rounding):
        if (source, target) != (interpreter.tl.float32, interpreter.tl.bfloat16):
            return convert(x, source, target, rounding)
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(interpreter, "_convert_float", round_to_bfloat16)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        patch.setattr(launch, "CONFIG", wide)
        yield


@pytest.fixture(scope="session")
def ranks():
    from ranks import Ranks

    world = Ranks(4)
    yield world
    world.close()
