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


@pytest.fixture(autouse=True, scope="session")
def _patch_interpreted_modules_once():
    """Triton's interpreter patches the language anew in every call of a device function.

    Once per module is enough, and makes interpreted kernels four times faster.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter", exc_type=ImportError)
    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield
