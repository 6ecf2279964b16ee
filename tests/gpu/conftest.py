"""Each test runs on every backend for GPU tensors: one that is missing fails, it is not skipped."""

import pytest

GPU_BACKENDS = ("triton", "cuda")
# Aligned rows and not, one split and several; beyond 2^16 and not a multiple of 2^17.
GPU_VOCABULARIES = (50257, 131072, 151936)
CPU_VOCABULARIES = (1025, 4096)


def pytest_generate_tests(metafunc):
    backends = metafunc.config.getoption("--backend") or GPU_BACKENDS
    on_cpu = backends == ["cpu"]
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", backends)
    if "vocab_size" in metafunc.fixturenames:
        metafunc.parametrize("vocab_size", CPU_VOCABULARIES if on_cpu else GPU_VOCABULARIES)


def pytest_ignore_collect(collection_path, config):
    """Streams, graphs and device memory are the GPU's alone."""
    if collection_path.name == "test_gpu_runtime.py":
        return config.getoption("--backend") == ["cpu"]
    return None


@pytest.fixture
def device(backend):
    return "cpu" if backend == "cpu" else "cuda"
