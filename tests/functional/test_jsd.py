"""The generalised Jensen-Shannon divergence, from its definition in float64 and its properties."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_kernels
from kl_kernels.backends.reference import rows as reference_rows

BACKENDS = ("reference", "cpu", "triton")
BETAS = (0.1, 0.5, 0.9)
NEG_INF = -math.inf


def divergence(p, q):  # [..., V] probabilities
    """KL(p || q), column by column."""
    return torch.where(p > 0, p * (p.log() - q.log()), 0.0)


def dense(x, y, beta):
    """Compute each column's share by the definition, in float64."""
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    m = (1 - beta) * p + beta * q
    return beta * divergence(q, m) + (1 - beta) * divergence(p, m)


def dense_gradient(x, y, beta):
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    ratio = torch.where(p > 0, (p / ((1 - beta) * p + beta * q)).log(), 0.0)
    return (1 - beta) * p * (ratio - (p * ratio).sum(-1, keepdim=True))


def random(*shape, spread=3.0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(spread * torch.randn(*shape, generator=g)).to(dtype) for _ in range(2)]


def evaluate(x, y, **how):
    x = x.detach().requires_grad_()
    jsd = kl_kernels.token_jsd(x, y, **how)
    return jsd.detach(), torch.autograd.grad(jsd.sum(), x)[0]


def binary_entropy(beta):
    return -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)


# The value.


@pytest.mark.parametrize("beta", BETAS)
def test_two_tokens_by_hand(beta):
    """Probabilities 1/4, 3/4 and 2/3, 1/3: every sum is written out."""
    x, y = torch.tensor([1.0, 3.0]).log(), torch.tensor([2.0, 1.0]).log()
    m1, m2 = (1 - beta) / 4 + beta * 2 / 3, (1 - beta) * 3 / 4 + beta / 3
    of_policy = math.log(0.25 / m1) / 4 + 3 * math.log(0.75 / m2) / 4
    of_reference = 2 * math.log(2 / 3 / m1) / 3 + math.log(1 / 3 / m2) / 3
    expected = beta * of_reference + (1 - beta) * of_policy
    for backend in BACKENDS:
        got = kl_kernels.token_jsd(x, y, beta=beta, backend=backend)
        assert got == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("backend", "vocab_size"),
    [
        *itertools.product(BACKENDS, (1, 2, 37, 2049)),
        *((backend, 9000) for backend in BACKENDS if backend != "triton"),  # interpreted: 20 s
    ],
)
def test_value_and_gradient_are_those_of_the_definition(vocab_size, backend):
    for beta, dtype in itertools.product(BETAS, (torch.float32, torch.bfloat16, torch.float16)):
        x, y = random(2, 3, vocab_size, dtype=dtype)
        jsd, grad = evaluate(x, y, beta=beta, backend=backend)
        assert jsd.dtype == torch.float32
        torch.testing.assert_close(
            jsd.double(), dense(x, y, beta).sum(-1), rtol=2e-6, atol=1e-7, msg=str((beta, dtype))
        )
        rounding = {"rtol": torch.finfo(dtype).eps, "atol": 2e-7}
        torch.testing.assert_close(grad.double(), dense_gradient(x, y, beta), **rounding)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 0.1])
def test_a_reference_nearby(distance, backend):
    """Nothing first-order cancels: the error is absolute, and far below a KL of 1e-6."""
    x, noise = random(4, 3000)
    y = x + distance * noise / 3
    for beta in BETAS:
        true = dense(x, y, beta).sum(-1)
        jsd = kl_kernels.token_jsd(x, y, beta=beta, backend=backend).double()
        worst = {"reference": 1e-9, "cpu": 3e-11 + 2e-7 * distance, "triton": 5e-8}[backend]
        assert (jsd - true).abs().max() <= worst + 1e-4 * true.max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets_change_nothing(offset, backend):
    """Offsets of whole numbers, to logits of few bits: the shifted ones are exact."""
    x, y = ((t * 64).round() / 64 for t in random(4, 700))
    shifted, shifted_grad = evaluate(x + offset, y - offset / 2, backend=backend)
    jsd, grad = evaluate(x, y, backend=backend)
    torch.testing.assert_close(shifted, jsd, rtol=3e-6, atol=3e-7)
    torch.testing.assert_close(shifted_grad, grad, rtol=0, atol=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gaps_of_hundreds_of_bits_are_bounded_by_the_entropy_of_beta(backend):
    """Disjoint one-hot distributions attain it."""
    x, y = torch.zeros(4, 300), torch.zeros(4, 300)
    for row, height in enumerate((100.0, 1000.0, 1e4, 1e6)):
        x[row, 7], y[row, 290] = height, height
    for beta in (1e-3, *BETAS, 0.999):
        jsd, grad = evaluate(x, y, beta=beta, backend=backend)
        expected = torch.full((4,), binary_entropy(beta))
        torch.testing.assert_close(jsd, expected, rtol=2e-6, atol=2e-7)
        assert grad.abs().max() < 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_betas_near_the_ends_stay_finite(backend):
    x, y = torch.zeros(1, 50), torch.zeros(1, 50)
    x[0, 3], y[0, 4] = 200.0, 200.0
    for beta in (1e-12, 1e-9, 1 - 1e-9, 1 - 1e-12):
        jsd, grad = evaluate(x, y, beta=beta, backend=backend)
        assert 0 <= jsd <= 2e-6
        assert grad.abs().max() < 3e-7


# Properties.


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_unit_in_the_last_place_never_makes_it_negative(backend):
    """Rounding would push some of 64 rows below 0."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    x, up = random(64, 50, dtype=dtype)
    y = torch.where(up > 0, torch.nextafter(x, torch.tensor(math.inf, dtype=dtype)), x)
    for beta in BETAS:
        jsd = kl_kernels.token_jsd(x, y, beta=beta, backend=backend)
        assert (jsd >= 0).all()
        assert jsd.max() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_rows_give_exactly_zero(backend):
    x, _ = random(3, 999)
    x[1, 5:50] = NEG_INF
    for beta in (1e-5, 0.1, 0.3, 0.5, 0.77, 0.9):
        jsd, grad = evaluate(x, x.clone(), beta=beta, backend=backend)
        assert not jsd.any()
        assert not grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 1000), beta=st.floats(0.01, 0.99), spread=st.sampled_from([0.01, 1, 30]))
def test_bounds_and_symmetries(backend, seed, beta, spread):
    x, y = random(2, 40, spread=spread, seed=seed)
    jsd, grad = evaluate(x, y, beta=beta, backend=backend)
    assert (jsd >= 0).all()
    assert (jsd <= binary_entropy(beta) + 1e-6).all()
    assert grad.double().sum(-1).abs().max() < 3e-7
    swapped = kl_kernels.token_jsd(y, x, beta=1 - beta, backend=backend)
    torch.testing.assert_close(swapped, jsd, rtol=3e-6, atol=1e-7)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    permuted, permuted_grad = evaluate(x[:, order], y[:, order], beta=beta, backend=backend)
    torch.testing.assert_close(permuted, jsd, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(permuted_grad, grad[:, order], rtol=0, atol=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_a_vocabulary_add_up(backend):
    x, y = (t[None] for t in random(3, 600))
    x[0, 1, 100:400] = NEG_INF  # all of the second part
    expected = evaluate(x, y, beta=0.3, backend=backend)[0]
    scales = 1.0, 1.0, None, None
    ops = torch.ops.kl_kernels
    _, kl, *states = ops.token_jsd(x, y, None, 0.3, *scales, False, backend)
    parts = sum(
        ops.mixture_part(x[..., a:b], y[..., a:b], None, *states, 0.3, *scales, backend)
        for a, b in ((0, 100), (100, 400), (400, 600))
    )
    torch.testing.assert_close(parts[0], expected, rtol=3e-6, atol=1e-7)
    torch.testing.assert_close(parts[1], kl, rtol=3e-6, atol=1e-7)
    columns = dense(x, y, 0.3)
    part = ops.mixture_part(x[..., :100], y[..., :100], None, *states, 0.3, *scales, backend)[0]
    torch.testing.assert_close(part.double(), columns[..., :100].sum(-1), rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_ends_are_the_two_divergences(backend):
    x, y = random(2, 3, 50, spread=1.0)
    kl = kl_kernels.token_kl(x, y, torch.zeros(2, 3, dtype=torch.long), backend=backend)
    assert torch.equal(kl_kernels.token_jsd(x, y, beta=0, backend=backend), kl.forward_kl)
    assert torch.equal(kl_kernels.token_jsd(x, y, beta=1.0, backend=backend), kl.kl)
    # The slope at beta = 0: jsd / beta goes to KL(reference || policy).
    near = kl_kernels.token_jsd(x.double(), y.double(), beta=1e-7) / 1e-7
    torch.testing.assert_close(near, kl.forward_kl.double(), rtol=2e-5, atol=0)


def test_gradcheck_in_float64():
    x, y = random(2, 2, 11, dtype=torch.float64)
    mask = torch.tensor([[True, False], [True, True]])
    for beta in BETAS:

        def function(z, beta=beta):
            return kl_kernels.token_jsd(
                z,
                y,
                beta=beta,
                mask=mask,
                temperature=0.7,
                ref_temperature=1.3,
                softcap=4.0,
                ref_softcap=3.0,
            )

        assert torch.autograd.gradcheck(function, x.requires_grad_())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_temperatures_and_softcaps(backend):
    x, y = random(2, 3, 130, spread=8.0)
    how = {
        "beta": 0.3,
        "temperature": 0.7,
        "ref_temperature": 1.3,
        "softcap": 5.0,
        "ref_softcap": 9.0,
    }
    expected, expected_grad = evaluate(x.double(), y.double(), **how)
    jsd, grad = evaluate(x, y, **how, backend=backend)
    torch.testing.assert_close(jsd.double(), expected, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0, atol=3e-7)


# Hard rows.


@pytest.mark.parametrize("backend", BACKENDS)
def test_support_may_differ(backend):
    x, y = random(3, 500)
    x[0, ::3], y[1, ::3], x[2, 100:], y[2, :100] = NEG_INF, NEG_INF, NEG_INF, NEG_INF
    for beta in BETAS:
        jsd, grad = evaluate(x, y, beta=beta, backend=backend)
        true = dense(x, y, beta).sum(-1)
        torch.testing.assert_close(jsd.double(), true, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(grad.double(), dense_gradient(x, y, beta), rtol=0, atol=2e-7)
        assert not grad[0, ::3].any()
        assert jsd[2] == pytest.approx(binary_entropy(beta), abs=3e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", [0, 1])
@pytest.mark.parametrize("trouble", ["nan", "inf", "all -inf"])
def test_a_bad_row_is_nan_and_no_other(trouble, model, backend):
    rows = random(3, 2100)
    expected, expected_grad = evaluate(*rows, backend=backend)
    if trouble == "all -inf":
        rows[model][1] = NEG_INF
    else:
        rows[model][1, 2050] = float(trouble)
    jsd, grad = evaluate(*rows, backend=backend)
    assert jsd[1].isnan()
    assert grad[1].isnan().any()
    assert torch.equal(jsd[::2], expected[::2])
    assert torch.equal(grad[::2], expected_grad[::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0, 0.5, 1])
def test_masked_rows_are_not_read(beta, backend):
    x, y = random(2, 3, 41)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    expected = evaluate(x, y, beta=beta, backend=backend)
    x[~mask], y[~mask] = math.nan, math.nan
    jsd, grad = evaluate(x, y, beta=beta, mask=mask, backend=backend)
    assert torch.equal(jsd, expected[0].masked_fill(~mask, 0.0))
    assert torch.equal(grad, expected[1].masked_fill(~mask[..., None], 0.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_empty_batches(backend):
    wide_x, wide_y = random(3, 4, 77)
    x, y = wide_x[:, :-1, 3:70], wide_y.transpose(0, 1)[1:, :3, :67].transpose(0, 1)
    got = evaluate(x, y, beta=0.3, backend=backend)
    expected = evaluate(x.contiguous(), y.contiguous(), beta=0.3, backend=backend)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    for shape in ((0, 5), (2, 0, 5)):
        jsd, grad = evaluate(torch.empty(shape), torch.empty(shape), backend=backend)
        assert jsd.shape == shape[:-1]
        assert grad.shape == shape
    jsd, grad = evaluate(torch.tensor([3.0]), torch.tensor([-2.0]), backend=backend)
    assert jsd == 0
    assert grad.abs() < 1e-7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_the_gradient_may_go_over_the_logits(softcap, dtype, backend):
    x, y = random(2, 2, 4133, dtype=dtype)
    mask = torch.tensor([[True, True], [False, True]])
    expected = evaluate(x, y, mask=mask, softcap=softcap, backend=backend)[1]
    leaf = x.clone().requires_grad_()
    logits = leaf * 1.0
    address = logits.data_ptr()
    grads = []
    logits.register_hook(grads.append)
    jsd = kl_kernels.token_jsd(
        logits, y, mask=mask, softcap=softcap, inplace_backward=True, backend=backend
    )
    jsd.sum().backward()
    assert grads[0].data_ptr() == address
    assert torch.equal(grads[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend):
    x, y = random(2, 3, 2600, dtype=torch.bfloat16)
    together, grads = evaluate(x, y, backend=backend)
    alone, grad = evaluate(x[1:, 1:2], y[1:, 1:2], backend=backend)
    assert torch.equal(alone, together[1:, 1:2])
    assert torch.equal(grad, grads[1:, 1:2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_upstream_reaches_every_gradient(backend):
    """Also one of all bits, which rounding by adding would turn into a number."""
    x, y = random(2, 4096, dtype=torch.bfloat16)
    jsd = kl_kernels.token_jsd(x.requires_grad_(), y, backend=backend)
    jsd.backward(torch.full((2,), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32))
    assert x.grad.isnan().all()


# Arguments.


def test_bad_arguments_are_named():
    x, y = random(2, 5)
    for beta in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"beta is .*; accepted: 0 to 1"):
            kl_kernels.token_jsd(x, y, beta=beta)
    with pytest.raises(ValueError, match="ref_logits has shape"):
        kl_kernels.token_jsd(x, y[:, :4])
    with pytest.raises(ValueError, match="ref_logits requires grad"):
        kl_kernels.token_jsd(x, y.requires_grad_())
    with pytest.raises(ValueError, match="ref_temperature is 0"):
        kl_kernels.token_jsd(x, y.detach(), ref_temperature=0)
    with pytest.raises(ValueError, match="vocab_start is 3, but there is no group"):
        kl_kernels.token_jsd(x, y.detach(), vocab_start=3)


def test_second_derivatives_are_refused():
    x, y = random(2, 5)
    jsd = kl_kernels.token_jsd(x.requires_grad_(), y)
    grad = torch.autograd.grad(jsd.sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_the_reference_backend_rounds_nothing_but_its_outputs(monkeypatch):
    """Blocks and groups of rows change nothing beyond float64."""
    x, y = random(3, 4, 100, dtype=torch.float64)
    expected = evaluate(x, y, beta=0.3, backend="reference")
    monkeypatch.setattr(reference_rows, "BLOCK_V", 7)
    monkeypatch.setattr(reference_rows, "GROUP_ELEMENTS", 14)
    got = evaluate(x, y, beta=0.3, backend="reference")
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(got[0], dense(x, y, 0.3).sum(-1), rtol=1e-13, atol=1e-15)
