"""Several tokens per position: values and gradients of log_softmax, gathered, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_kernels
from kl_kernels.functional.selective import sum_over_equals

BACKENDS = ("reference", "cpu", "triton")


def truth(logits, index, temperature=1.0):
    x = logits.detach().double().requires_grad_()
    return x, (x / temperature).log_softmax(-1).gather(-1, index.long())


def assert_right(logits, index, *, temperature=1.0, **options):
    """Values and, for a random upstream gradient, the gradient."""
    logits = logits.detach().requires_grad_()
    found = kl_kernels.selective_log_softmax(logits, index, temperature, **options)
    assert found.dtype == torch.promote_types(torch.float32, logits.dtype)
    x, expected = truth(logits, index, temperature)
    torch.testing.assert_close(found.double(), expected, rtol=4e-7, atol=4e-7)
    upstream = torch.randn(index.shape, dtype=found.dtype)
    found.backward(upstream)
    expected.backward(upstream.double())
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(logits.dtype, 2e-6)
    torch.testing.assert_close(logits.grad.double(), x.grad, rtol=half_ulp, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("vocab_size", "k"), [(1, 1), (2, 3), (301, 6), (1024, 64)])
def test_several_tokens_per_position(backend, dtype, vocab_size, k):
    torch.manual_seed(vocab_size)
    logits = (torch.randn(2, 3, vocab_size) * 4).to(dtype)
    index = torch.randint(vocab_size, (2, 3, k))
    assert_right(logits, index, temperature=0.7, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_token_per_position(backend):
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 50) * 4).requires_grad_()
    index, mask = torch.tensor([[0, 49, -100], [7, 7, 2]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    options = {"temperature": 0.7, "row_mask": mask, "backend": backend}
    found = kl_kernels.selective_log_softmax(logits, index, **options)
    x, expected = truth(logits, index.clamp_min(0)[..., None], 0.7)
    expected = expected[..., 0] * mask
    torch.testing.assert_close(found.double(), expected, rtol=4e-7, atol=4e-7)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(logits.grad.double(), x.grad, rtol=2e-6, atol=2e-6)


def test_tokens_that_repeat_share_one_entry():
    torch.manual_seed(0)
    index = torch.tensor([[3, 3, 3, 1], [0, 2, 0, 2]])
    assert_right(torch.randn(2, 5), index)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_far_from_zero_nothing_is_lost(offset):
    torch.manual_seed(0)
    logits = torch.randn(4, 1001) * 3 + offset
    assert_right(logits, torch.randint(1001, (4, 9)))


def test_peaked_rows():
    logits = torch.zeros(1, 1000)
    logits[0, 7] = 60.0
    assert_right(logits, torch.tensor([[7, 8, 999]]))


def test_rank_and_integer_type_are_free():
    torch.manual_seed(0)
    assert_right(torch.randn(2, 2, 3, 11), torch.randint(11, (2, 2, 3, 4)).int())
    assert_right(torch.randn(11), torch.randint(11, (4,)))


def test_views_are_taken_as_they_are():
    torch.manual_seed(0)
    base = torch.randn(2, 6, 40, requires_grad=True)
    index = torch.randint(30, (2, 5, 3))
    found = kl_kernels.selective_log_softmax(base[:, :-1, :30], index)
    x, expected = truth(base[:, :-1, :30], index)
    torch.testing.assert_close(found.double(), expected, rtol=4e-7, atol=4e-7)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(base.grad[:, :-1, :30].double(), x.grad, rtol=2e-6, atol=2e-6)
    assert not base.grad[:, -1].any()
    assert not base.grad[..., 30:].any()


def test_ruled_out_tokens_have_minus_infinity_and_a_finite_gradient():
    torch.manual_seed(0)
    logits = torch.randn(3, 50)
    logits[:, :20] = -torch.inf
    logits[2] = -torch.inf
    logits = logits.requires_grad_()
    index = torch.tensor([[3, 30, 40], [1, 2, 3], [3, 30, 40]])
    found = kl_kernels.selective_log_softmax(logits, index)
    assert found[0].isinf().tolist() == [True, False, False]
    assert (found[1] == -torch.inf).all()
    assert found[2].isnan().all()  # a row of nothing has no distribution
    found[:2].backward(torch.ones(2, 3))
    p = logits.detach().softmax(-1)[:2]
    expected = -3 * p
    for row in range(2):
        expected[row, index[row]] += 1
    torch.testing.assert_close(logits.grad[:2], expected, rtol=2e-6, atol=2e-6)


def test_masked_rows_are_zero_whatever_they_hold():
    torch.manual_seed(0)
    logits = torch.randn(3, 20)
    logits[1] = torch.nan
    logits = logits.requires_grad_()
    index = torch.tensor([[1, 2], [-100, 99], [3, 3]])
    mask = torch.tensor([1, 0, 1])
    found = kl_kernels.selective_log_softmax(logits, index, row_mask=mask)
    found.backward(torch.tensor([[1.0, 1.0], [torch.nan, 1.0], [1.0, 1.0]]))
    assert found[1].tolist() == [0.0, 0.0]
    assert not logits.grad[1].any()
    x, expected = truth(logits[::2], index[::2])
    torch.testing.assert_close(found[::2].double(), expected, rtol=4e-7, atol=4e-7)
    expected.sum().backward()
    torch.testing.assert_close(logits.grad[::2].double(), x.grad, rtol=2e-6, atol=2e-6)


def test_gradient_of_float64_is_that_of_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (2, 3, 4))
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.autograd.gradcheck(
        lambda x: kl_kernels.selective_log_softmax(x, index, 0.8, mask), logits
    )


def test_second_derivatives_are_refused():
    logits = torch.randn(2, 7, requires_grad=True)
    found = kl_kernels.selective_log_softmax(logits, torch.tensor([[1, 2], [3, 4]]))
    (grad,) = torch.autograd.grad(found.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        grad.sum().backward()


def test_it_compiles_into_one_graph():
    torch.manual_seed(0)
    logits, index = torch.randn(4, 33), torch.randint(33, (4, 5))
    compiled = torch.compile(kl_kernels.selective_log_softmax, fullgraph=True)
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    one, other = compiled(a, index), kl_kernels.selective_log_softmax(b, index)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("index", "error", "said"),
    [
        (torch.zeros(4, 3, dtype=torch.long), ValueError, r"index has shape \(4, 3\)"),
        (torch.zeros(2, 0, dtype=torch.long), ValueError, "K >= 1"),
        (torch.zeros(2, 1, 0, dtype=torch.long), ValueError, "K >= 1"),
        (torch.zeros(2, 3), TypeError, "index has dtype torch.float32"),
        (torch.tensor([[1, 2], [3, 9]]), ValueError, "index holds 9"),
    ],
)
def test_a_bad_index_is_named(index, error, said):
    with pytest.raises(error, match=said):
        kl_kernels.selective_log_softmax(torch.zeros(2, *[1] * (index.ndim - 2), 9), index)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_sums_over_equal_ids(ids):
    values = torch.arange(1.0, len(ids) + 1)
    expected = [sum(float(v) for i, v in zip(ids, values) if i == own) for own in ids]
    assert sum_over_equals(torch.tensor(ids), values).tolist() == expected


def test_gradients_of_several_tokens_from_arguments_of_any_strides():
    torch.manual_seed(0)
    index, mask = torch.randint(17, (2, 5, 3)), torch.rand(2, 5) < 0.7

    def turned(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    def gradient(index, mask):
        torch.manual_seed(1)
        logits = torch.randn(2, 5, 17, requires_grad=True)
        logprobs = kl_kernels.selective_log_softmax(logits, index, row_mask=mask)
        (logprobs * torch.randn(2, 5, 3)).sum().backward()
        return logits.grad

    expected = gradient(index, mask)
    assert torch.equal(gradient(turned(index), mask), expected)
    assert torch.equal(gradient(index, turned(mask)), expected)
