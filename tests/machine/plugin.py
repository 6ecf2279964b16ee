"""`pytest --machine ARCH`: GPU backends take CPU tensors, and their kernels run as PTX.

Every test must end without a fault. Kernels are patched in before any test is imported.
"""

from __future__ import annotations

import dataclasses
import time
from contextlib import ExitStack
from typing import Any

import pytest

from kl_kernels.backends import dispatch

from .arithmetic import approximation
from .launches import Launches, summary

RUNNING: dict[str, Launches] = {}  # by backend
EVERYTHING = ExitStack()


def pytest_configure(config: Any) -> None:
    started = time.perf_counter()
    EVERYTHING.enter_context(approximation(config.getoption("--approximation")))
    for backend in config.getoption("--backend") or ("triton", "cuda"):
        launches = BACKENDS[backend](config)
        RUNNING[backend] = EVERYTHING.enter_context(launches)
        kernels = launches.operators(launches.kernels())
        dispatch.BACKENDS[backend] = dataclasses.replace(
            dispatch.BACKENDS[backend],
            kernels=lambda kernels=kernels: kernels,
            unavailable_reason=lambda: None,
            device_types=("cuda", "cpu"),
        )
    config.machine_ready = time.perf_counter() - started


def pytest_unconfigure() -> None:
    EVERYTHING.close()


def triton(config: Any) -> Launches:
    from .triton_launches import TritonLaunches

    return TritonLaunches(config.getoption("--machine"))


def cuda(config: Any) -> Launches:
    from .cuda_launches import CudaLaunches

    return CudaLaunches(config.getoption("--machine"), config.getoption("--launches"))


BACKENDS = {"triton": triton, "cuda": cuda}


@pytest.fixture(autouse=True)
def _no_faults() -> Any:
    yield
    for backend, launches in RUNNING.items():
        faults = launches.take_faults()
        assert not faults, f"{backend}: {len(faults)} faults\n{summary(faults)}"


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    for backend, launches in RUNNING.items():
        terminalreporter.write_line(
            f"{backend}, {config.getoption('--machine')}: {launches.n_launches} launches of "
            f"{launches.n_kernels} kernels, {launches.seconds:.0f} s"
        )
