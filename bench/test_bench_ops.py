"""Small sizes, where a call's own cost shows: `python -m pytest bench --benchmark-only`.

One group per job and size; within it, the backends side by side.
"""

import pytest
import torch
from formulas import check, eager, make_inputs, ours, with_gradient

# Rows and vocabulary: one token, a small model's batch, a short response of a large model.
SIZES = ((1, 32000), (512, 2048), (16, 128256))
CONTENDERS = {"kl_kernels": ours, "eager": eager}


@pytest.fixture(params=SIZES, ids=lambda size: "{}x{}".format(*size))
def size(request):
    return request.param


@pytest.fixture(params=(torch.bfloat16, torch.float32), ids=lambda dtype: str(dtype)[6:])
def dtype(request):
    return request.param


@pytest.mark.parametrize("contender", CONTENDERS)
def test_forward(benchmark, contender, size, dtype):
    run(benchmark, "token_kl", torch.no_grad()(CONTENDERS[contender]), size, dtype)


@pytest.mark.parametrize("contender", CONTENDERS)
def test_forward_and_backward(benchmark, contender, size, dtype):
    call = with_gradient(CONTENDERS[contender])
    run(benchmark, "token_kl and gradient", call, size, dtype)


def run(benchmark, job, call, size, dtype):
    n_rows, vocab_size = size
    check(min(n_rows, 2), vocab_size, dtype)  # no number without a right answer
    benchmark.group = f"{job} {n_rows}x{vocab_size} {str(dtype)[6:]}"
    benchmark.extra_info["megabytes of logits"] = 2 * n_rows * vocab_size * dtype.itemsize / 1e6
    benchmark.pedantic(call, make_inputs(n_rows, vocab_size, dtype), rounds=20, warmup_rounds=2)
