"""Heads whose products are multiplied in 16 bits, as on a GPU: how precise, and at what cost.

A CPU multiplies the same 16-bit factors in float32: a GPU's sums, but for their order. What a GPU
runs is listed on tensors without data.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kl_kernels
from kl_kernels.partitioned import gradients, products
from kl_kernels.partitioned.products import multiplication

N, D, V = 512, 64, 2048


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(
        products, "multiplies_narrow", lambda device, dtype: dtype in products.NARROW
    )


class Case:
    def __init__(self, spread, advantages, *, dtype=torch.bfloat16, weight_dtype=None, seed=0):
        g = torch.Generator().manual_seed(seed)
        hidden = torch.randn(1, N, D, generator=g)
        weight = torch.randn(V, D, generator=g) * spread / math.sqrt(D)
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(weight_dtype or dtype).requires_grad_()
        logits = self.hidden.detach().double() @ self.weight.detach().double().T
        self.token_ids = torch.distributions.Categorical(logits=logits).sample()
        self.advantages = torch.ones(1, N)
        if advantages == "mixed":
            self.advantages = torch.randn(1, N, generator=g)

    @property
    def leaves(self):
        return self.hidden, self.weight

    def ours(self, **options):
        out = kl_kernels.linear_token_stats(*self.leaves, self.token_ids, **options)
        loss = (self.advantages * out.logprob + 0.01 * out.entropy).sum()
        return torch.autograd.grad(loss, self.leaves)

    def definition(self, logits, upstream_dtype=torch.float64):
        log_p = logits.log_softmax(-1)
        logprob = log_p.gather(-1, self.token_ids[..., None])[..., 0]
        entropy = -(log_p.exp() * log_p).sum(-1)
        return (self.advantages.to(upstream_dtype) * logprob + 0.01 * entropy).sum()

    def truth(self):
        leaves = [leaf.detach().double().requires_grad_() for leaf in self.leaves]
        return torch.autograd.grad(self.definition(leaves[0] @ leaves[1].T), leaves)

    def eager(self):
        """Run what users run: logits in 16 bits, softmax in float32."""
        logits = (self.hidden @ self.weight.T).float()
        return torch.autograd.grad(self.definition(logits, torch.float32), self.leaves)


def error(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


def systematic(found, truth):
    difference = found.double() - truth
    return abs(float((difference * truth).sum() / truth.square().sum()))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("spread", "advantages", "backend"),
    [
        *itertools.product([1, 4, 6], ["equal", "mixed"], ["cpu"]),
        # These write 16-bit gradients themselves.
        (4, "equal", "reference"),
        (4, "equal", "triton"),
    ],
)
def test_gradients_lose_little_more_than_their_own_rounding(spread, advantages, backend):
    case = Case(spread, advantages)
    for ours, exact, eager in zip(case.ours(backend=backend), case.truth(), case.eager()):
        assert error(ours, exact) <= 1.3 * error(exact.bfloat16(), exact)
        assert error(ours, exact) <= error(eager, exact)
        rounding = systematic(exact.bfloat16(), exact)
        assert systematic(ours, exact) < rounding + 1e-4


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("precision", ["split", "float32"])
@pytest.mark.parametrize("spread", [1, 6])
def test_other_precisions_are_nearly_float32(spread, precision, monkeypatch):
    """Before they are stored: sums are given to float32 gradients here."""
    case = Case(spread, "mixed")
    found = []
    store = gradients._Sums.store

    def spy(self, scale):
        found.append(self._weight_sums.clone())
        store(self, scale)

    monkeypatch.setattr(gradients._Sums, "store", spy)
    case.ours(gradient_precision=precision)
    assert error(torch.cat(found), case.truth()[1]) < 1e-5


@pytest.mark.usefixtures("narrow")
def test_a_float32_weight_beside_narrow_hidden_states_is_split():
    """Forward is then as precise as float32; a gradient of the weight is stored in float32."""
    case = Case(6, "mixed", weight_dtype=torch.float32)
    out = kl_kernels.linear_token_stats(*case.leaves, case.token_ids)
    exact = (case.hidden.double() @ case.weight.double().T).log_softmax(-1)
    exact = exact.gather(-1, case.token_ids[..., None])[..., 0]
    torch.testing.assert_close(out.logprob.double(), exact, rtol=1e-4, atol=1e-4)
    hidden, weight = case.ours()
    assert (hidden.dtype, weight.dtype) == (torch.bfloat16, torch.float32)
    assert error(weight, case.truth()[1]) < 2e-3
    assert error(hidden, case.truth()[0]) < 1.3 * error(case.truth()[0].bfloat16(), case.truth()[0])


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e3])
def test_float16_gradients_neither_vanish_nor_overflow(size):
    case = Case(1, "mixed", dtype=torch.float16)
    case.hidden.data *= 64  # so that the gradient of the weight is one that float16 can hold
    case.weight.data /= 64
    case.advantages = case.advantages * size
    kept = torch.float32
    hidden = case.hidden.detach().requires_grad_()
    weight, bias = case.weight.detach(), torch.zeros(V, dtype=kept, requires_grad=True)
    out = kl_kernels.linear_token_stats(hidden, weight, case.token_ids, bias=bias)
    (grad,) = torch.autograd.grad((case.advantages * out.logprob).sum(), [bias])
    logits = hidden.detach().double() @ weight.double().T
    p = logits.softmax(-1)[0]
    exact = torch.zeros_like(p).scatter_(-1, case.token_ids[0, :, None], 1.0) - p
    exact = (case.advantages[0].double()[:, None] * exact).sum(0)
    assert error(grad, exact) < 1e-3


def test_a_device_that_refuses_multiplies_in_float32():
    cpu = torch.device("cpu")
    assert "mm.dtype" in products.refusal(cpu, torch.bfloat16)
    hidden, weight = torch.zeros(1, 2, 3).bfloat16(), torch.zeros(4, 3).bfloat16()
    assert multiplication(hidden, weight, torch.float32, "narrow").dtype == torch.float32


class Ledger(TorchDispatchMode):
    """Lists the operations that run, with their operands' dtypes and multiplications."""

    NOTHING = ("alias", "detach", "expand", "permute", "scalar_tensor", "select", "slice", "t")
    NOTHING += ("transpose", "unbind", "unsqueeze", "view")

    def __init__(self):
        super().__init__()
        self.counts, self.flops, self.dtypes = Counter(), 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._opname
        if name not in self.NOTHING and not name.startswith(("_", "empty", "new_empty")):
            self.counts[name] += 1
        if name in ("mm", "addmm", "addmm_"):
            a, b = [t for t in args if isinstance(t, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
            self.dtypes.add((a.dtype, b.dtype))
        return result


def on_meta(function, n=8192, d=4096, v=128256, dtype=torch.bfloat16):
    def empty(*size):
        return torch.empty(*size, dtype=dtype, device="meta")

    token_ids = torch.empty(1, n, dtype=torch.int64, device="meta")
    leaves = empty(1, n, d).requires_grad_(), empty(v, d).requires_grad_()
    if function == "stats":
        return leaves, lambda: kl_kernels.linear_token_stats(*leaves, token_ids)
    reference = empty(1, n, d), empty(v, d)
    if function == "jsd":
        return leaves, lambda: [kl_kernels.linear_token_jsd(*leaves, *reference)]
    return leaves, lambda: kl_kernels.linear_token_kl(*leaves, *reference, token_ids)


@pytest.mark.parametrize(
    ("function", "forward_products", "backward_products"),
    [("stats", 1, 3), ("kl", 2, 4), ("jsd", 4, 4)],
)
def test_what_a_gpu_runs(function, forward_products, backward_products):
    n, d, v = 8192, 4096, 128256
    product = 2 * n * d * v
    leaves, call = on_meta(function)
    with Ledger() as forward:
        outputs = call()
    with Ledger() as backward:
        torch.autograd.grad([outputs[0]], leaves, torch.empty_like(outputs[0]))
    if function == "kl":
        backward_products -= 1  # the log-probability alone: the reference is not multiplied again
    for ledger, expected in ((forward, forward_products), (backward, backward_products)):
        assert ledger.flops == expected * product
        assert ledger.dtypes == {(torch.bfloat16, torch.bfloat16)}
        kernels = ("fold_part", "mixture_part", f"token_{function}_backward_")
        n_tiles = sum(ledger.counts[kernel] for kernel in (*kernels, "token_stats_backward_"))
        assert sum(ledger.counts.values()) <= 15 * n_tiles + 100
        assert not {"nonzero", "item", "_local_scalar_dense"} & ledger.counts.keys()
