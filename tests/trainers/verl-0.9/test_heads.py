"""The output layer of verl's fused kernels, beside those kernels."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kl_kernels.integrations.verl import linear_cross_entropy

# verl wants widths that 128 divides; it takes the vocabulary in 1024s, and sums rows past the last
# where 16 does not divide their number.
N, D, V = 16, 128, 1300
CASES = [
    (torch.float32, 1.0, "none"),
    (torch.float32, 0.7, "sum"),
    (torch.float32, 1.3, "mean"),
    (torch.float16, 0.7, "none"),
]


def arguments(dtype, temperature, reduction):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, N, D, generator=generator).to(dtype)
    weight = (torch.randn(V, D, generator=generator) / 4).to(dtype)
    labels = torch.randint(V, (1, N), generator=generator)
    of_logprobs = torch.linspace(-1, 2, N) if reduction == "none" else torch.tensor(0.6)
    return hidden, weight, labels, temperature, reduction, (of_logprobs, torch.linspace(1, -1, N))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Outputs and gradients of every case, from one process of Triton's interpreter."""
    path = tmp_path_factory.mktemp("heads") / "cases.pt"
    torch.save([arguments(*case) for case in CASES], path)
    script = Path(__file__).parent / "their_head.py"
    subprocess.run([sys.executable, "-O", script, path], check=True)
    return dict(zip(CASES, torch.load(path)))


@pytest.mark.exercises("linear_cross_entropy: values and gradients, each reduction")
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_values_and_gradients(case, theirs):
    hidden, weight, labels, temperature, reduction, upstream = arguments(*case)
    leaves = [t.requires_grad_() for t in (hidden, weight)]
    outputs = linear_cross_entropy(*leaves, labels, temperature, reduction)
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    # Theirs rounds gradients of logits to float16, and their sums over parts of the vocabulary.
    rounding = 1e-5 if hidden.dtype == torch.float32 else 5e-3
    for one, other in zip((*outputs, *gradients), theirs[case]):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        largest = other.abs().max()
        torch.testing.assert_close(one, other, rtol=rounding, atol=rounding * float(largest))
