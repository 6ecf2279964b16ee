"""Each test runs on every backend for GPU tensors: one that is missing fails, it is not skipped.

With `--machine ARCH` the same kernels run on the CPU, as PTX.
"""

import pytest

GPU_BACKENDS = ("triton", "cuda")
# Aligned rows and not, one split and several; beyond 2^16 and not a multiple of 2^17.
GPU_VOCABULARIES = (50257, 131072, 151936)
CPU_VOCABULARIES = (1025, 4096)
# Rows of one split: of more it has small_cases.py.
MACHINE_VOCABULARIES = (75, 2601, 4112)
MACHINE_HEADS = {"N": 40, "V": 1000}  # in place of test_gpu_heads.py's sizes


def pytest_generate_tests(metafunc):
    config = metafunc.config
    backends = config.getoption("--backend") or GPU_BACKENDS
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends)
    if "vocab_size" in metafunc.fixturenames:
        sizes = CPU_VOCABULARIES if backends == ["cpu"] else GPU_VOCABULARIES
        metafunc.parametrize("vocab_size", MACHINE_VOCABULARIES if on_machine(config) else sizes)


def on_machine(config):
    return config.getoption("--machine") is not None


def pytest_ignore_collect(collection_path, config):
    """Streams, graphs and device memory are the GPU's alone."""
    if collection_path.name == "test_gpu_runtime.py":
        return on_machine(config) or config.getoption("--backend") == ["cpu"] or None
    return None


@pytest.fixture
def device(backend, pytestconfig):
    return "cpu" if backend == "cpu" or on_machine(pytestconfig) else "cuda"


@pytest.fixture(autouse=True)
def _heads_of_the_machine(request, monkeypatch):
    if on_machine(request.config) and request.module.__name__ == "test_gpu_heads":
        for name, size in MACHINE_HEADS.items():
            monkeypatch.setattr(request.module, name, size)
