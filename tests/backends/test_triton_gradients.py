"""The Triton kernels' writes of gradients, and the reads of the one-visit policy loss.

Tiles are as small as in test_triton_backend.py. The numbers are tested elsewhere, on every backend.
"""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from triton_writers import (
    LAYOUTS,
    MASK,
    SMALL,
    WRITERS,
    V,
    draw,
    policy_loss,
    token_stats,
)

from kl_kernels.backends import reference
from kl_kernels.backends import triton as triton_kernels
from kl_kernels.backends.triton import epilogues, launch, loss
from kl_kernels.schemas import (
    ESTIMATORS,
    POLICY_LOSS_TERMS,
    ScaleGradientArgs,
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(launch, "CONFIG", dataclasses.replace(launch.CONFIG, **SMALL))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_may_overwrite_the_logits(layout, write):
    x, y, token_ids = draw(*layout)
    apart = torch.full_like(x, torch.nan)
    write(x, y, token_ids, apart)
    assert not apart.isnan().any()
    assert (apart[~MASK] == 0).all()
    write(x, y, token_ids, x)
    assert torch.equal(x, apart)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("padding", [8, 3])  # rows that stay aligned, and rows that do not
def test_nothing_is_written_around_the_gradient(padding, write):
    x, y, token_ids = draw()
    expected = torch.empty_like(x)
    write(x, y, token_ids, expected)
    buffer = torch.full((3, 4, padding + V + padding), 7.0)
    grad = buffer[1:, :3, padding : padding + V]
    write(x, y, token_ids, grad)
    assert torch.equal(grad, expected)
    grad.fill_(7.0)
    assert (buffer == 7).all()


@pytest.mark.parametrize("write", WRITERS)
def test_stores_are_as_wide_as_the_buffer_allows(write, monkeypatch):
    """The interpreter stores anywhere: a GPU faults where lanes are wider than rows are aligned."""
    tiles, tile = [], launch.gradient_tile_of
    monkeypatch.setattr(launch, "gradient_tile_of", lambda *t: tiles.append(tile(*t)) or tiles[-1])
    x, y, token_ids = draw()
    grad = torch.empty(2, 3, V + 3)[..., 3:]
    write(x, y, token_ids, grad)
    assert tiles[-1]["LANE"] == 1


def test_a_gradient_far_away_does_not_wrap(tmp_path):
    """Rows 2^30 numbers apart, in a sparse file."""
    x, y, token_ids = (t[:1] for t in draw(dtype=torch.bfloat16))
    stride = 2**30 + 16
    path = str(tmp_path / "gradient")
    storage = torch.from_file(path, shared=True, size=2 * stride + V, dtype=torch.bfloat16)
    far = storage.as_strided((1, 3, V), (3 * stride, stride, 1))
    near = torch.empty_like(x)
    mask = MASK[:1]
    for grad in (far, near):
        policy_loss(
            x,
            y,
            token_ids,
            grad,
            mask=mask,
            advantages=mask.float(),
            token_weights=mask.float(),
        )
        triton_kernels.scale_gradient(ScaleGradientArgs(grad, torch.tensor(3.0)))
    assert torch.equal(far, near)
    assert near[0, 2].any()


# The policy loss: the same numbers in any tiles, and nothing read in vain.


@pytest.mark.parametrize("estimator", ["exact", "k2", "k3"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_policy_loss_does_not_depend_on_tiles(layout, estimator):
    x, y, token_ids = draw(*layout)
    x[0, 0, -5] = 60.0  # behind the anchor: the running-max loop's
    x[1, 0, 40:50], y[1, 0, 40:50] = -torch.inf, -torch.inf
    g = torch.Generator().manual_seed(1)
    old = -3 + torch.randn(2, 3, generator=g)
    options = {
        "old_logprobs": old,
        "advantages": torch.randn(2, 3, generator=g),
        "dual_clip": 3.0,
        "importance_weights": torch.rand(2, 3, generator=g),
        "ref_logprobs": old - 0.3,
        "kl_estimator": ESTIMATORS.index(estimator),
        "log_ratio_clamp": 4.0,
    }
    grads = torch.empty_like(x), torch.empty_like(x)
    terms = policy_loss(x, y, token_ids, grads[0], **options)
    expected = policy_loss(x, y, token_ids, grads[1], reference, **options)
    torch.testing.assert_close(terms, expected, rtol=3e-6, atol=3e-6)
    rounding = 2e-6 if x.dtype == torch.float32 else 2**-9
    # The gradient of a certain token is 0, a difference of terms around the loss's weights.
    scale = grads[1].float().norm(dim=-1).clamp_min(0.01)
    assert ((grads[0].float() - grads[1].float()).norm(dim=-1) <= rounding * scale).all()


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("backend", [triton_kernels, reference])
def test_a_tokens_own_entry_is_told_before_it_is_rounded(backend, softcap):
    """Beside a gradient in another dtype, which heads multiply."""
    x, y, token_ids = draw()
    options = {"softcap": softcap, "advantages": torch.tensor([[1.0, 1.0, 0.0], [-2.0, 0.5, 3.0]])}
    exact = torch.empty_like(x, dtype=torch.float64)
    policy_loss(x.double(), y.double(), token_ids, exact, reference, **options)
    rounded, own = torch.empty_like(x, dtype=torch.bfloat16), torch.full((2, 3), torch.nan)
    policy_loss(x, y, token_ids, rounded, backend, own_gradient=own, **options)
    true = exact.gather(-1, token_ids[..., None])[..., 0]
    torch.testing.assert_close(own.double(), true, rtol=2e-5, atol=1e-8)
    assert ((rounded.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-7).all()
    assert (own[~MASK] == 0).all()
    nothing = torch.full((2, 3), torch.nan)  # a loss without a gradient
    clipped = {"old_logprobs": torch.full((2, 3), -50.0), "kl_coef": 0.0, "entropy_coef": 0.0}
    clipped["advantages"] = torch.ones(2, 3)
    policy_loss(x, y, token_ids, rounded, backend, own_gradient=nothing, **clipped)
    assert (nothing == 0).all()


@pytest.fixture
def read_again(monkeypatch):
    """The first place of each tile that the gradient's loop reads, and whether of a pair."""
    tiles, write_gradient = [], loss.write_gradient

    def record(grad_row, at, mask, x, y, c, of, *evictions):
        if at.handle.data.ndim > 1:  # not the few logits outside vectors
            tiles.append((int(at.handle.data.min()), bool(of.KL)))
        return write_gradient(grad_row, at, mask, x, y, c, of, *evictions)

    monkeypatch.setattr(loss, "write_gradient", record)
    return tiles


def test_a_row_is_read_again_from_its_end(read_again):
    x, y, token_ids = draw()
    policy_loss(x, y, token_ids, x)
    row = [(at, True) for at in (320, 256, 192, 128, 64, 0)]
    assert read_again == row * 5


def test_without_a_kl_gradient_the_reference_is_not_read_again(read_again):
    x, y, token_ids = draw()
    policy_loss(x, y, token_ids, x, kl_coef=0.0)
    assert read_again
    assert not any(of_pair for _, of_pair in read_again)


@pytest.mark.parametrize("coefficient", [None, "kl_coef", "entropy_coef"])
def test_a_row_without_a_gradient_is_not_read_again(coefficient, read_again):
    x, y, token_ids = draw()
    logprob = token_stats(x, token_ids).logprob
    clipped = {"old_logprobs": logprob - 1, "kl_coef": 0.0, "entropy_coef": 0.0}
    if coefficient is not None:
        clipped[coefficient] = 0.1
    grad = torch.full_like(x, torch.nan)
    policy_loss(x, y, token_ids, grad, **clipped)
    assert bool(read_again) == (coefficient is not None)
    assert (grad == 0).all() == (coefficient is None)


def test_without_a_buffer_there_is_no_second_look(read_again):
    x, y, token_ids = draw()
    terms = policy_loss(x, y, token_ids, None)
    assert not read_again
    assert torch.equal(terms, policy_loss(x, y, token_ids, x))


def test_on_policy_ratios_are_one_up_to_rounding():
    x, y, token_ids = draw(dtype=torch.bfloat16)
    old = token_stats(x, token_ids).logprob
    ratio = POLICY_LOSS_TERMS.index("ratio_mean")
    of_itself = policy_loss(x, None, token_ids, None, old_logprobs=old, kl_coef=0.0)[ratio]
    torch.testing.assert_close(of_itself, MASK.float(), rtol=0.0, atol=1e-6)
    assert torch.equal(policy_loss(x, None, token_ids, None, kl_coef=0.0)[ratio], MASK.float())


@pytest.mark.parametrize("bad", [-1, V, 10**12])
def test_a_token_out_of_range_makes_its_row_nan(bad, monkeypatch):
    x, y, token_ids = draw()
    good = policy_loss(x, y, token_ids, None)
    monkeypatch.setattr(launch, "check_token_range", lambda *_: None)
    token_ids[1, 0] = token_ids[0, 1] = bad  # the latter masked
    here = torch.zeros(2, 3, dtype=torch.bool)
    here[1, 0] = True
    grad = torch.empty_like(x)
    terms = policy_loss(x, y, token_ids, grad)
    assert torch.equal(terms[0].isnan(), here)
    assert torch.equal(terms[:, ~here], good[:, ~here])
    assert torch.equal(grad.isnan(), here[..., None].expand_as(grad))


# A difference that cancels is taken from its series.


@triton.jit
def exponentials_kernel(d_ptr, linear_ptr, expm1_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    d = tl.load(d_ptr + at)
    tl.store(linear_ptr + at, epilogues.exp_minus_linear(d))
    tl.store(expm1_ptr + at, epilogues.expm1(d))


def test_exponentials_near_zero_keep_their_digits():
    size = torch.logspace(-6, 1, 128)
    d = torch.cat([size, -size])
    linear, expm1 = torch.empty_like(d), torch.empty_like(d)
    exponentials_kernel[(1,)](d, linear, expm1, N=len(d))
    true = torch.expm1(d.double())
    # exp(d) rounded costs 6e-8 of 1.42 where the series ends, 0.35: of 0.42, and of 0.069.
    torch.testing.assert_close(expm1.double(), true, rtol=3e-7, atol=0.0)
    near = d.abs() < 0.01  # the true difference cancels in float64, too
    series = d.double() ** 2 / 2 + d.double() ** 3 / 6 + d.double() ** 4 / 24
    true = torch.where(near, series, true - d)
    torch.testing.assert_close(linear.double(), true, rtol=2e-6, atol=0.0)


# Scaling.


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("factor", [0.3, 0.0, torch.nan])
def test_a_gradient_is_scaled_in_place(factor, layout):
    x = draw(*layout)[0].nan_to_num(5.0)
    buffer = torch.full((3, 4, x.shape[-1] + 8), 7.0, dtype=x.dtype)
    gradient = buffer[1:, :3, : x.shape[-1]]
    gradient.copy_(x)
    triton_kernels.scale_gradient(ScaleGradientArgs(gradient, torch.tensor(factor)))
    expected = (x.float() * torch.tensor(factor)).to(x.dtype)
    torch.testing.assert_close(gradient, expected, rtol=0.0, atol=0.0, equal_nan=True)
    gradient.fill_(7.0)
    assert (buffer == 7).all()


def test_a_factor_of_one_writes_nothing():
    # A signalling NaN: float32 arithmetic would make it a quiet one.
    signalling = torch.tensor([0x7F800001] * 8, dtype=torch.int32)
    gradient = signalling.clone().view(torch.float32).expand(1, 2, 8)
    triton_kernels.scale_gradient(ScaleGradientArgs(gradient, torch.tensor(1.0)))
    assert torch.equal(gradient[0, 0].view(torch.int32), signalling)
