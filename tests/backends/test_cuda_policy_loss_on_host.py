"""CUDA's policy loss on host threads (see test_cuda_on_host.py), wherever a row may be kept.

Against the reference backend in float64. A device is what decides where: with little shared memory
per block a row of 2973 logits takes one block, two or more; with none it is read again.
"""

import math

import pytest
import torch
from host.cuda_on_host import H200, backend, blocks_per_row, library, run_as
from operators import arguments

from kl_kernels.backends import reference
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.lab.validate.errors import GRADIENT_BUDGET, gradient_error
from kl_kernels.schemas import ESTIMATORS, POLICY_LOSS_TERMS, PolicyLossArgs, ScaleGradientArgs

VOCAB_SIZE = 2973
A100 = 163 << 10, 164 << 10, 0
NARROW = *H200[:2], 9  # SMs in a group
PLENTY = 1 << 20  # limits of an SM in which any number of blocks fits
SUMS = 300  # bytes that a block keeps its sums in


def device_for(n_blocks, logits, ref_logits):
    """Describe a GPU where a row takes `n_blocks`; 0: a cluster reads it again, -1: one block."""
    if n_blocks <= 0:
        return SUMS, PLENTY, 16 * (n_blocks == 0)
    part = -(-logits.shape[-1] // (64 * n_blocks)) * 64
    n_models = 1 if ref_logits is None else 2
    return n_models * logits.itemsize * (part + 8) + SUMS, PLENTY, 16 * (n_blocks > 1)


PLACES = (1, 2, 4, 16, 0, -1)
ON_CHIP_OR_NOT = (2, 0)
DEFAULTS = {
    "old_logprobs": None, "advantages": None, "token_weights": None, "importance_weights": None,
    "ref_logprobs": None, "own_gradient": None,
    "clip_low": 0.2, "clip_high": 0.3, "dual_clip": None,
    "log_ratio_clamp": 20.0, "kl_coef": 0.5, "kl_estimator": ESTIMATORS.index("exact"),
    "entropy_coef": 0.25, "temperature": 1.0, "ref_temperature": 1.0, "softcap": None,
    "ref_softcap": None,
}  # fmt: skip


def per_token(shape, seed=1, spread=1.0):
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def run(kernels, logits, ref_logits, token_ids, mask=None, grad_logits=..., **options):
    """(terms, gradient) of `policy_loss`, with per-token values for what is not given."""
    shape = token_ids.shape
    options = (
        DEFAULTS | {"advantages": per_token(shape), "token_weights": torch.ones(shape)} | options
    )
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask
    if grad_logits is ...:
        grad_logits = torch.full(logits.shape, math.nan, dtype=logits.dtype)
    given = {
        name: v.to(logits.dtype) if kernels is reference and isinstance(v, torch.Tensor) else v
        for name, v in options.items()
    }
    given |= {"logits": logits, "ref_logits": ref_logits, "token_ids": token_ids, "mask": mask}
    terms = kernels.policy_loss(PolicyLossArgs(**given, grad_logits=grad_logits))
    return terms, grad_logits


def check(place, logits, ref_logits, token_ids, mask=None, **options):
    ref_double = None if ref_logits is None else ref_logits.double()
    true, true_grad = run(reference, logits.double(), ref_double, token_ids, mask, **options)
    kernels = backend(device_for(place, logits, ref_logits))
    terms, grad = run(kernels, logits, ref_logits, token_ids, mask, **options)
    if place > 0 and options.get("softcap") is None and options.get("ref_softcap") is None:
        assert library().host_blocks_of_last_cluster() == place
    torch.testing.assert_close(terms.double(), true, rtol=4e-6, atol=2e-6, equal_nan=True)
    # The gradient is the difference of terms as large as the KL.
    kl = true[POLICY_LOSS_TERMS.index("kl")].nan_to_num(1.0, 1.0).clamp_min(1.0)
    error = gradient_error(grad, true_grad, kl / options.get("temperature", 1.0))
    assert error <= GRADIENT_BUDGET, (place, error)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_loss_and_gradient_are_true(difficulty, place):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = vars(Case(difficulty, VOCAB_SIZE, dtype).inputs())
        inputs["ref_temperature"] = inputs["ref_temperature"] or inputs["temperature"]
        check(place, **inputs)


def random_rows(vocab_size=VOCAB_SIZE, dtype=torch.float32, shape=(2, 2)):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, vocab_size, generator=g)).to(dtype)
    ref_logits = (3 * torch.randn(*shape, vocab_size, generator=g)).to(dtype)
    return logits, ref_logits, torch.randint(vocab_size, shape, generator=g)


@pytest.fixture(scope="module")
def logprobs():
    """Log-probabilities of the policy's random rows, and of the reference's, float32."""
    logits, ref_logits, token_ids = random_rows()
    args = arguments("token_kl", logits=logits, ref_logits=ref_logits, token_ids=token_ids)
    return reference.token_kl(args)[:2]


OPTIONS = {
    "clipped": {},
    "dual clip": {"dual_clip": 1.5},
    "log-ratio clamp": {"log_ratio_clamp": 0.3},
    "no clamp": {"log_ratio_clamp": None},
    "k2": {"kl_estimator": ESTIMATORS.index("k2")},
    "k3": {"kl_estimator": ESTIMATORS.index("k3")},
    "no kl": {"kl_coef": 0.0},
    "no entropy": {"entropy_coef": 0.0},
    "clip alone": {"kl_coef": 0.0, "entropy_coef": 0.0},
    "scaled": {"temperature": 0.7, "ref_temperature": 1.3},
    "capped": {"softcap": 5.0, "ref_softcap": 8.0},
}


@pytest.mark.parametrize("place", ON_CHIP_OR_NOT)
@pytest.mark.parametrize("with_reference", [True, False])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, with_reference, place, logprobs):
    """Off policy, so that clips decide; a reference is one's own, or there is none."""
    logits, ref_logits, token_ids = random_rows()
    logprob, ref_logprob = logprobs
    weights = {"token_weights": 0.2, "importance_weights": 0.5}
    check(
        place,
        logits,
        ref_logits if with_reference else None,
        token_ids,
        old_logprobs=logprob + per_token(token_ids.shape, 2, 0.7),
        ref_logprobs=None if with_reference else ref_logprob,
        **{k: per_token(token_ids.shape, 3).abs() * v + 0.1 for k, v in weights.items()},
        **OPTIONS[name] | ({"kl_coef": 0.0} if not with_reference and "k" not in name[0] else {}),
    )


@pytest.mark.parametrize("place", ON_CHIP_OR_NOT)
def test_a_metric_of_an_infinite_kl_leaves_the_gradient_alone(place):
    logits, ref_logits, token_ids = random_rows()
    ref_logits[..., ::3] = -math.inf
    check(place, logits, ref_logits, token_ids, kl_coef=0.0)


@pytest.mark.parametrize("place", ON_CHIP_OR_NOT)
def test_a_row_nobody_pulls_at_is_zero(place):
    """Logits that are NaN make no difference: they are not read again."""
    logits, ref_logits, token_ids = random_rows()
    advantages = torch.ones(2, 2)
    advantages[0, 1] = 0.0
    options = {"advantages": advantages, "kl_coef": 0.0, "entropy_coef": 0.0}
    kernels = backend(device_for(place, logits, ref_logits))
    _, grad = run(kernels, logits, ref_logits, token_ids, **options)
    assert not grad[0, 1].any()
    assert grad[0, 0].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("place", ON_CHIP_OR_NOT)
def test_layouts_change_nothing(place, dtype):
    """Bitwise: alignment, strides of logits and gradient, the gradient over the logits, none."""
    logits, ref_logits, token_ids = random_rows(2600, dtype)
    kernels = backend(device_for(place, logits, ref_logits))
    terms, grad = run(kernels, logits, ref_logits, token_ids)

    def view(tensor, shift):
        wide = torch.full((2, 2, 2600 + 16), math.nan, dtype=dtype)
        inner = wide[:, :, shift : shift + 2600].transpose(0, 1)
        inner.copy_(tensor)
        return inner, wide

    for shift, ref_shift, grad_shift in ((1, 0, 0), (0, 3, 2), (2, 2, 1), (0, 0, 0)):
        x, _ = view(logits, shift)
        y, _ = view(ref_logits, ref_shift)
        separate, around = view(torch.zeros_like(logits), grad_shift)
        for buffer in (separate, x):
            got, _ = run(kernels, x, y, token_ids, grad_logits=buffer)
            assert torch.equal(got, terms)
            assert torch.equal(buffer, grad)
        assert around.isnan().sum() == 2 * 2 * 16, "written beside the gradient"
    got, _ = run(kernels, logits, ref_logits, token_ids, grad_logits=None)
    assert torch.equal(got, terms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_logits_anywhere(dtype):
    """Bitwise: rows that hold no whole vector of 16 bytes, or one, and pieces of others."""
    for vocab_size in (1, 6, 13, 24):
        logits, ref_logits, token_ids = random_rows(vocab_size, dtype, (1, 1))
        kernels = backend(device_for(1, logits, ref_logits))
        terms, grad = run(kernels, logits, ref_logits, token_ids)
        for shift in range(1, 16 // logits.itemsize):
            wide = torch.full((2, vocab_size + 8), math.nan, dtype=dtype)
            x, y = wide[:, None, None, shift : shift + vocab_size]
            x.copy_(logits), y.copy_(ref_logits)
            got, _ = run(kernels, x, y, token_ids, grad_logits=x)
            assert torch.equal(got, terms)
            assert torch.equal(x, grad)
            assert wide.isnan().sum() == 2 * 8


@pytest.mark.parametrize("place", PLACES)
def test_a_row_does_not_depend_on_the_others(place):
    logits, ref_logits, token_ids = random_rows(dtype=torch.bfloat16)
    kernels = backend(device_for(place, logits, ref_logits))
    terms, grad = run(kernels, logits, ref_logits, token_ids, advantages=torch.ones(2, 2))
    row = slice(1, None), slice(1, 2)
    alone, grad_alone = run(
        kernels,
        logits[row],
        ref_logits[row],
        token_ids[row].contiguous(),
        advantages=torch.ones(1, 1),
    )
    assert torch.equal(alone, terms[:, 1:, 1:2])
    assert torch.equal(grad_alone, grad[row])


def test_a_token_outside_the_vocabulary_is_nan():
    logits, ref_logits, token_ids = random_rows()
    token_ids[0, 1] = VOCAB_SIZE
    for place in PLACES:
        terms, grad = run(
            backend(device_for(place, logits, ref_logits)), logits, ref_logits, token_ids
        )
        assert terms[0, 0, 1].isnan()
        assert grad[0, 1].isnan().all()
        assert grad[0, 0].isfinite().all()


@pytest.mark.parametrize(
    ("device", "vocab_size", "dtype", "with_reference", "n_blocks"),
    [
        (H200, 16000, torch.bfloat16, True, 1),
        (H200, 32000, torch.bfloat16, True, 2),
        (H200, 128256, torch.bfloat16, False, 4),
        (H200, 128256, torch.bfloat16, True, 8),
        (H200, 151936, torch.bfloat16, True, 8),
        (H200, 262144, torch.bfloat16, False, 8),
        (H200, 262144, torch.bfloat16, True, 16),
        (H200, 262144, torch.float32, False, 16),
        (H200, 262144, torch.float32, True, 16),
        (NARROW, 262144, torch.bfloat16, True, 8),
        (NARROW, 262144, torch.float32, True, 0),
        (A100, 32000, torch.bfloat16, True, 1),
        (A100, 128256, torch.bfloat16, True, 0),
    ],
)
def test_where_rows_are_kept(device, vocab_size, dtype, with_reference, n_blocks):
    run_as(device)
    assert blocks_per_row(vocab_size, dtype, with_reference) == n_blocks


@pytest.mark.parametrize(
    ("sms_of_group", "n_blocks"), [(16, 8), (3, 8), (2, 0)], ids=["many", "enough", "few"]
)
def test_a_cluster_that_finds_no_room_is_not_asked_for(sms_of_group, n_blocks):
    """Three blocks of a pair's 64 kB fit into an SM, and all of a cluster into a group of SMs."""
    run_as((*H200[:2], sms_of_group))
    assert blocks_per_row(128256, torch.bfloat16, with_reference=True) == n_blocks
    run_as(H200)


@pytest.mark.parametrize(
    ("device", "n_blocks"),
    [
        ((13 << 10, 80 << 10, 1), 2),
        ((8 << 10, 15 << 10, 3), 8),  # three to an SM
        ((8 << 10, 15 << 10, 2), 4),  # two to an SM, as six of 8 would find room
        ((SUMS, 15 << 10, 1), 4),  # the row is read again
        ((SUMS, 4 << 10, 1), 2),
    ],
)
def test_losses_are_true_where_groups_of_sms_are_small(device, n_blocks):
    logits, ref_logits, token_ids = random_rows()
    true, true_grad = run(reference, logits.double(), ref_logits.double(), token_ids)
    terms, grad = run(backend(device), logits, ref_logits, token_ids)
    assert library().host_blocks_of_last_cluster() == n_blocks
    torch.testing.assert_close(terms.double(), true, rtol=4e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", [1, 7, 2600, 2601])
def test_scale_gradient(vocab_size, dtype):
    for shift in (0, 1):
        wide = per_token((2, 3, vocab_size + 8)).to(dtype)
        gradient = wide[..., shift : shift + vocab_size]
        for factor in (1.0, 0.3):
            expected = wide.clone()
            expected[..., shift : shift + vocab_size] *= factor
            backend().scale_gradient(ScaleGradientArgs(gradient, torch.tensor(factor)))
            assert torch.equal(wide, expected)


def test_no_rows():
    logits, ref_logits, token_ids = random_rows(shape=(0, 3))
    terms, grad = run(backend(), logits, ref_logits, token_ids)
    assert terms.shape == (8, 0, 3)
    assert grad.shape == logits.shape
