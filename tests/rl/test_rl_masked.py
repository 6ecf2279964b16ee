"""Masked statistics against torch's own on the selected positions, float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kl_kernels import masked_mean, masked_var, masked_whiten

FUNCTIONS = {
    "mean": masked_mean,
    "var": masked_var,
    "biased_var": lambda x, mask: masked_var(x, mask, unbiased=False),
    "whiten": masked_whiten,
    "whiten_keep_mean": lambda x, mask: masked_whiten(x, mask, shift_mean=False),
}


def sample(mask, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(mask.shape, generator=g, dtype=torch.float64) * 3 + 5


masks = st.lists(st.booleans(), min_size=2, max_size=20).filter(lambda m: sum(m) >= 2)


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 2**31))
def test_statistics_are_those_of_the_selected_positions(mask, seed):
    mask = torch.tensor(mask)
    x = sample(mask, seed)
    selected = x[mask]
    close = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(masked_mean(x, mask), selected.mean(), **close)
    torch.testing.assert_close(masked_var(x, mask), selected.var(), **close)
    torch.testing.assert_close(
        masked_var(x, mask, unbiased=False), selected.var(correction=0), **close
    )
    whitened = (selected - selected.mean()) / (selected.var() + 1e-8).sqrt()
    torch.testing.assert_close(masked_whiten(x, mask)[mask], whitened, **close)
    torch.testing.assert_close(
        masked_whiten(x, mask, shift_mean=False)[mask], whitened + selected.mean(), **close
    )
    assert (masked_whiten(x, mask, shift_mean=False)[~mask] == 0).all()


def test_shift_mean_removes_the_mean_and_its_absence_keeps_it():
    mask = torch.ones(1000, dtype=torch.bool)
    x = sample(mask)
    assert abs(masked_whiten(x, mask).mean()) < 1e-13
    assert abs(masked_whiten(x, mask, shift_mean=False).mean() - x.mean()) < 1e-13


def test_mean_over_dimensions():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    x = torch.tensor([[1.0, 7.0, 2.0], [5.0, 6.0, 7.0]])
    assert masked_mean(x, mask).item() == 1.5
    assert masked_mean(x, mask, dim=1).tolist() == [1.5, 0]
    assert masked_mean(x, mask, dim=-1).tolist() == [1.5, 0]
    assert masked_mean(x, mask, dim=0).tolist() == [1, 0, 2]
    assert masked_mean(x, mask, dim=(0, 1)).item() == 1.5


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_garbage_reaches_neither_result_nor_gradient(function, garbage):
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])
    clean = sample(mask).requires_grad_()
    dirty = clean.detach().masked_fill(mask == 0, garbage).requires_grad_()
    weights = sample(mask, seed=1)
    grads = []
    for x in (clean, dirty):
        result = function(x, mask)
        scalar = result if result.ndim == 0 else (result * weights).sum()
        grads.append(torch.autograd.grad(scalar, x)[0])
    assert torch.equal(function(clean, mask), function(dirty, mask))
    assert torch.equal(*grads)
    assert (grads[1][mask == 0] == 0).all()
    assert grads[1].abs().max() > 1e-3


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_gradients_are_those_of_finite_differences(function):
    mask = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    x = sample(mask).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: function(x, mask), x)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (0,), (2, 0)])
def test_nothing_unmasked_gives_zero_and_no_gradient(function, shape):
    x = torch.full(shape, torch.nan).requires_grad_()
    result = function(x, torch.zeros(shape))
    assert (result == 0).all()
    assert (torch.autograd.grad(result.sum(), x)[0] == 0).all()


def test_one_position_has_no_spread():
    mask = torch.tensor([0, 1, 0])
    x = torch.tensor([1.0, 7.0, 3.0]).requires_grad_()
    assert masked_mean(x, mask).item() == 7
    assert masked_var(x, mask).item() == 0
    assert masked_var(x, mask, unbiased=False).item() == 0
    assert masked_whiten(x, mask).tolist() == [0, 0, 0]
    assert masked_whiten(x, mask, shift_mean=False).tolist() == [0, 7, 0]
    assert torch.autograd.grad(masked_whiten(x, mask).sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_masks_of_every_dtype_and_low_precision_input(function):
    mask = torch.tensor([1, 0, 1, 1])
    x = sample(mask)
    expected = function(x, mask.bool())
    for dtype in (torch.int64, torch.uint8, torch.float32, torch.bfloat16):
        assert torch.equal(function(x, mask.to(dtype)), expected)
    assert function(x.bfloat16(), mask).dtype == torch.float32
    assert torch.equal(function(x.bfloat16(), mask), function(x.bfloat16().float(), mask))


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_bad_arguments_are_named(function):
    with pytest.raises(ValueError, match="mask has shape"):
        function(torch.zeros(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match="mask is a bool"):
        function(torch.zeros(2, 3), True)


def test_negative_eps_is_refused():
    with pytest.raises(ValueError, match="eps is -1"):
        masked_whiten(torch.zeros(2), torch.ones(2), eps=-1.0)
