"""Linear heads on a GPU, whose matrix products no CPU has: values and gradients against float64."""

import itertools

import pytest
import torch

import kl_kernels
from kl_kernels.partitioned.products import multiplies_narrow

N, D, V = 300, 128, 5000
FACTORS = {
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float32": (torch.float32, torch.float32),
    "float32 weight": (torch.bfloat16, torch.float32),
}
# The error of a gradient's norm, beside that of rounding the exact gradient to its own dtype. (A
# divergence's has no entry of a token's own, but a few as large, whose rounding is not put back.)
MOST_OF_ROUNDING = {"linear_token_stats": 1.3, "linear_token_kl": 1.3, "linear_token_jsd": 1.5}
MOST_OF_FLOAT32 = 5e-5


class Heads:
    def __init__(self, factors, device):
        g = torch.Generator().manual_seed(0)
        hidden_dtype, weight_dtype = FACTORS[factors]

        def normal(*size, spread=1.0):
            return spread * torch.randn(*size, generator=g)

        spread = 4 * D**-0.5
        made = (
            normal(2, N // 2, D).to(hidden_dtype),
            normal(V, D, spread=spread).to(weight_dtype),
            normal(2, N // 2, D).to(hidden_dtype),
            normal(V, D, spread=spread).to(weight_dtype),
        )
        self.hidden, self.weight, self.ref_hidden, self.ref_weight = (t.to(device) for t in made)
        self.token_ids = torch.randint(V, (2, N // 2), generator=g).to(device)
        self.mask = (torch.rand(2, N // 2, generator=g) < 0.7).to(device)
        self.upstream = normal(2, N // 2).to(device)

    def call(self, name, backend, masked, **options):
        options |= {"backend": backend, "mask": self.mask if masked else None}
        if name == "linear_token_stats":
            heads = self.hidden, self.weight
            return sum(kl_kernels.linear_token_stats(*heads, self.token_ids, **options))
        heads = self.hidden, self.weight, self.ref_hidden, self.ref_weight
        if name == "linear_token_jsd":
            return kl_kernels.linear_token_jsd(*heads, **options)
        out = kl_kernels.linear_token_kl(*heads, self.token_ids, **options)
        return out.logprob + out.kl - out.forward_kl

    def evaluate(self, *how, **options):
        self.hidden.requires_grad_(), self.weight.requires_grad_()
        value = self.call(*how, **options)
        gradients = torch.autograd.grad((value * self.upstream).sum(), (self.hidden, self.weight))
        return value.detach(), gradients

    def in_float64(self):
        of = object.__new__(Heads)
        for name, value in vars(self).items():
            exact = value.detach().double() if value.is_floating_point() else value
            setattr(of, name, exact)
        return of


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("name", ["linear_token_stats", "linear_token_kl", "linear_token_jsd"])
def test_values_and_gradients_are_true(backend, device, name, factors, masked):
    heads = Heads(factors, device)
    value, gradients = heads.evaluate(name, backend, masked)
    exact, exact_gradients = heads.in_float64().evaluate(name, "reference", masked)
    torch.testing.assert_close(value.double(), exact, rtol=2e-4, atol=2e-4)
    for gradient, truth in zip(gradients, exact_gradients):
        rounding = error(truth.to(gradient.dtype), truth)
        narrow = multiplies_narrow(heads.hidden.device, heads.hidden.dtype)
        # A float32 gradient of narrow products is as far off as if it were stored rounded.
        least = MOST_OF_ROUNDING[name] * 2e-3 if narrow else MOST_OF_FLOAT32
        assert error(gradient, truth) <= max(MOST_OF_ROUNDING[name] * rounding, least)


def test_a_gpu_multiplies_narrow_factors(backend, device):
    expected = device == "cuda"
    for dtype in (torch.bfloat16, torch.float16):
        assert multiplies_narrow(torch.device(device, 0 if expected else None), dtype) == expected


@pytest.mark.parametrize("factors", ["bfloat16", "float32"])
def test_runs_are_bitwise_equal(backend, device, factors):
    heads = Heads(factors, device)
    first = heads.evaluate("linear_token_kl", backend, masked=True)
    for _ in range(3):
        again = heads.evaluate("linear_token_kl", backend, masked=True)
        for a, b in zip((first[0], *first[1]), (again[0], *again[1])):
            assert torch.equal(a, b)


@pytest.mark.parametrize("precision", ["narrow", "split", "float32"])
def test_precisions_are_in_their_order(backend, device, precision):
    heads = Heads("float32 weight", device)  # whose gradient is not rounded once more
    name = "linear_token_stats"
    _, (_, found) = heads.evaluate(name, backend, False, gradient_precision=precision)
    _, (_, truth) = heads.in_float64().evaluate(name, "reference", False)
    most = {"narrow": 2e-3, "split": 2e-5, "float32": 2e-5}[precision]
    assert error(found, truth) < most


def test_tiles_of_all_sizes_agree(backend, device):
    heads = Heads("bfloat16", device)
    budgets = (200_000, 2_000_000, 50_000_000)
    found = [
        heads.evaluate("linear_token_stats", backend, False, memory_budget=budget)
        for budget in budgets
    ]
    for (value, gradients), (other, of_other) in itertools.pairwise(found):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5)
        for gradient, another in zip(gradients, of_other):
            assert error(gradient, another.double()) < 3e-3


def test_a_captured_step_replays_on_new_hidden_states(backend, device):
    """The rows under a mask are listed beforehand: looking for them would wait for the GPU."""
    heads, others = Heads("bfloat16", device), Heads("bfloat16", device)
    others.hidden = others.hidden.roll(1, dims=1)
    listed = {"row_index": heads.mask.flatten().nonzero()[:, 0]}
    heads.evaluate("linear_token_kl", backend, False, **listed)
    expected = others.evaluate("linear_token_kl", backend, False, **listed)
    if device == "cpu":  # it has no graphs
        assert torch.equal(expected[0] != 0, heads.mask)
        return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        heads.evaluate("linear_token_kl", backend, False, **listed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradients = heads.evaluate("linear_token_kl", backend, False, **listed)
    with torch.no_grad():
        heads.hidden.copy_(others.hidden)
    graph.replay()
    for a, b in zip((value, *gradients), (expected[0], *expected[1])):
        assert torch.equal(a, b)
