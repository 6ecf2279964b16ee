"""Heads whose products are multiplied in 16 bits, as on a GPU: how precise, and at what cost.

A CPU multiplies the same 16-bit factors in float32: a GPU's sums, but for their order. What a GPU
runs is listed in tests/lab/test_cost.py.
"""

import itertools
import math

import pytest
import torch

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
        self.token_ids = torch.multinomial(logits[0].softmax(-1), 1, generator=g).T
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
@pytest.mark.parametrize("spread", [1, 4, 6])
@pytest.mark.parametrize("function", ["kl", "jsd"])
def test_gradients_of_divergences_are_nearer_than_eager(function, spread):
    """Several entries of a row are large here, and only a token's own is put back."""
    case, teacher = Case(spread, "mixed"), Case(spread, "mixed", seed=1)
    reference = teacher.hidden.detach(), teacher.weight.detach()
    if function == "kl":
        divergence = kl_kernels.linear_token_kl(*case.leaves, *reference, case.token_ids).kl
    else:
        divergence = kl_kernels.linear_token_jsd(*case.leaves, *reference)

    def definition(hidden, weight, ref_hidden, ref_weight):
        log_p = (hidden @ weight.T).to(torch.promote_types(weight.dtype, torch.float32))
        log_q = (ref_hidden @ ref_weight.T).to(log_p.dtype).log_softmax(-1)
        log_p = log_p.log_softmax(-1)
        if function == "kl":
            return (log_p.exp() * (log_p - log_q)).sum()
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        return sum((x.exp() * (x - log_m)).sum() for x in (log_p, log_q)) / 2

    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in case.leaves]
    exact_value = definition(*exact_leaves, *(t.double() for t in reference))
    truth = torch.autograd.grad(exact_value, exact_leaves)
    eager = torch.autograd.grad(definition(*case.leaves, *reference), case.leaves)
    ours = torch.autograd.grad(divergence.sum(), case.leaves)
    for found, exact, other in zip(ours, truth, eager):
        assert error(found, exact) <= 1.5 * error(exact.bfloat16(), exact)
        assert error(found, exact) <= error(other, exact)


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


def test_values_of_tokens_that_repeat_are_added_to_their_sums():
    g = torch.Generator().manual_seed(0)
    for shape in ((50, 3), (50,)):
        values, ids = torch.randn(shape, generator=g), torch.randint(7, (50,), generator=g)
        sums = torch.randn(9, *shape[1:], generator=g)
        expected = sums.double().index_add(0, ids, values.double())
        gradients.add_at_tokens(sums, values, ids)
        torch.testing.assert_close(sums.double(), expected, rtol=1e-6, atol=1e-6)
    for nothing in (torch.zeros(0, 3), torch.zeros(0)):
        sums = torch.ones(9, *nothing.shape[1:])
        gradients.add_at_tokens(sums, nothing, torch.zeros(0, dtype=torch.long))
        assert (sums == 1).all()
