"""Shapes, strides, dtypes and empty tensors: the same numbers whatever the layout."""

import mmap

import pytest
import torch

import kl_kernels

BACKENDS = ("reference", "cpu", "triton")
V = 75


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, V, generator=g)
    return logits, torch.randn(3, 5, V, generator=g), torch.randint(V, (3, 5), generator=g)


def views(logits):
    """Tensors with the values of `logits` [3, 5, V] and other strides."""
    wide = torch.full((3, 6, V + 9), torch.nan)
    wide[:, :5, 3 : V + 3] = logits
    yield "rows and vocabulary sliced", wide[:, :5, 3 : V + 3]
    yield "batch and tokens exchanged", logits.transpose(0, 1).contiguous().transpose(0, 1)
    yield "vocabulary strided", logits.transpose(0, 2).contiguous().transpose(0, 2)
    odd = torch.full((3 * 5 * (V + 2) + 1,), torch.nan)
    shifted = odd.as_strided((3, 5, V), (5 * (V + 2), V + 2, 1), 1)
    shifted.copy_(logits)
    yield "rows unaligned", shifted


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_give_the_same_numbers_and_gradients(backend, inputs):
    logits, ref_logits, token_ids = inputs
    expected, expected_grad = evaluate(logits, ref_logits, token_ids, backend)
    for (name, x), (_, y) in zip(views(logits), views(ref_logits)):
        got, grad = evaluate(x, y, token_ids, backend)
        assert torch.equal(got, expected), name
        assert torch.equal(grad, expected_grad), name


def evaluate(x, y, token_ids, backend):
    x = x.detach().requires_grad_()
    result = kl_kernels.token_kl(x, y, token_ids, temperature=0.8, backend=backend)
    grad = torch.autograd.grad(result.kl.sum() + 2 * result.logprob.sum(), x)[0]
    return torch.stack(result).detach(), grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_rows_are_read_through_stride_zero(backend, inputs):
    logits, ref_logits, token_ids = inputs
    row, ref_row = logits[:1, :1].expand(3, 5, V), ref_logits[:1, :1].expand(3, 5, V)
    got = kl_kernels.token_kl(row, ref_row, token_ids, backend=backend)
    expected = kl_kernels.token_kl(row.clone(), ref_row.clone(), token_ids, backend=backend)
    assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (15,), (3, 5), (3, 1, 5), (1, 3, 1, 5)])
def test_any_number_of_leading_dimensions(backend, inputs, shape):
    logits, ref_logits, token_ids = inputs
    n = 15 if shape else 1
    flat = [t.reshape(15, *t.shape[2:])[:n] for t in inputs]
    expected = kl_kernels.token_kl(*flat, backend=backend)
    got = kl_kernels.token_kl(
        *(t.reshape(shape + t.shape[1:]) for t in flat),
        mask=torch.ones(shape),
        backend=backend,
    )
    for a, b in zip(got, expected):
        assert a.shape == shape
        assert torch.equal(a.reshape(-1), b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), (2, 0, 3)])
def test_no_tokens(backend, shape):
    logits = torch.randn(*shape, V, requires_grad=True)
    result = kl_kernels.token_kl(
        logits, torch.randn(*shape, V), torch.zeros(shape, dtype=torch.long), backend=backend
    )
    assert all(t.shape == shape for t in result)
    sum(t.sum() for t in result).backward()
    assert logits.grad.shape == logits.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_in_rewards(backend):
    logits = torch.randn(2, 0, V)
    ids = torch.zeros(2, 0, dtype=torch.long)
    result = kl_kernels.kl_rewards(
        logits, logits, ids, torch.ones(2), ids.bool(), kl_coef=0.1, backend=backend
    )
    assert result.rewards.shape == (2, 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_are_float32_and_gradients_have_the_dtype_of_the_logits(backend, dtype, inputs):
    logits, ref_logits, token_ids = inputs
    logits = logits.to(dtype).requires_grad_()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    assert {t.dtype for t in result} == {torch.float32}
    result.kl.sum().backward()
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_tokens_and_numeric_masks(backend, inputs):
    logits, ref_logits, token_ids = inputs
    mask = torch.rand(3, 5) < 0.5
    expected = kl_kernels.token_kl(logits, ref_logits, token_ids, mask=mask, backend=backend)
    for dtype in (torch.float32, torch.int32, torch.uint8):
        got = kl_kernels.token_kl(
            logits, ref_logits, token_ids.int(), mask=mask.to(dtype), backend=backend
        )
        assert torch.equal(torch.stack(got), torch.stack(expected))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_depend_on_the_others(backend, inputs):
    """Bitwise: batch composition must not change a log-probability."""
    together, grads = evaluate(*inputs, backend)
    for b in range(3):
        alone, grad = evaluate(*(t[b : b + 1, 2:4] for t in inputs), backend)
        assert torch.equal(alone, together[:, b : b + 1, 2:4])
        assert torch.equal(grad, grads[b : b + 1, 2:4])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equal_rows_have_exactly_no_divergence_and_hardly_a_gradient(backend, dtype, inputs):
    logits = (10 * inputs[0]).to(dtype).requires_grad_()
    result = kl_kernels.token_kl(logits, logits.detach().clone(), inputs[2], backend=backend)
    assert torch.equal(result.kl, torch.zeros(3, 5))
    assert torch.equal(result.forward_kl, torch.zeros(3, 5))
    assert torch.equal(result.logprob, result.ref_logprob)
    # The terms of the gradient cancel to within a rounding of themselves, p times log p.
    grad = torch.autograd.grad(result.kl.sum(), logits)[0].abs()
    log_p = logits.detach().float().log_softmax(-1)
    assert (grad <= 2**-23 * log_p.exp() * log_p.abs().clamp_min(1.0)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_more_than_2_to_the_31_logits_apart(backend, inputs):
    """Offsets in 32 bits would read elsewhere. The memory in between is never touched."""
    logits, ref_logits, token_ids = (t[:2, :1] for t in inputs)
    stride = 2**31 + 3

    def far_apart(rows):
        memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + V)), dtype=torch.bfloat16)
        return memory.as_strided((2, 1, V), (stride, V, 1)).copy_(rows)

    expected, expected_grad = evaluate(logits.bfloat16(), ref_logits.bfloat16(), token_ids, backend)
    got, grad = evaluate(far_apart(logits), far_apart(ref_logits), token_ids, backend)
    assert torch.equal(got, expected)
    assert torch.equal(grad, expected_grad)
