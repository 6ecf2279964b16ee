"""Without a GPU, Triton kernels run interpreted; uninitialised memory is NaN in every test."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are decorated: before any import


@pytest.fixture(autouse=True)
def _poison_uninitialised_memory():
    """`torch.empty` fills with NaN in deterministic mode: an output nobody wrote fails its test."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
