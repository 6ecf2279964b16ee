"""KL over K tokens and a tail: by enumeration over the merged events, in float64."""

import math

import pytest
import torch

import kl_kernels
from kl_kernels.functional import topk

BACKENDS = ("reference", "cpu", "triton")
BETAS = (0.0, 0.3, 0.5, 1.0)


def kl(p, q):
    """Sum p log p/q, with 0 log 0 = 0, as a loop."""
    total = 0.0
    for a, b in zip(p, q):
        if a > 0:
            total = total + a * (a / b).log()
    return total


def divergence(p, q, beta):
    if beta in (0, 1):
        return kl(q, p) if beta == 0 else kl(p, q)
    mixture = [(1 - beta) * a + beta * b for a, b in zip(p, q)]
    return beta * kl(q, mixture) + (1 - beta) * kl(p, mixture)


def truth(row, ids, logprobs, beta, temperature=1.0, softcap=None):
    """Compute one row's loss: events are the listed ids, and the sum over all other tokens."""
    x = row.detach().double().requires_grad_()
    z = x if softcap is None else softcap * torch.tanh(x / softcap)
    policy = (z / temperature).softmax(-1)
    q = [math.exp(logprob) for logprob in logprobs.double().tolist()]
    listed = {int(i): b for i, b in zip(ids, q) if b > 0}
    others = [i for i in range(len(row)) if i not in listed]
    p = [policy[i] for i in listed] + [policy[others].sum()]
    q = [torch.tensor(b).double() for b in (*listed.values(), 1 - sum(listed.values()))]
    return x, divergence(p, q, beta)


def assert_right(logits, ids, logprobs, beta, *, rtol=1e-6, atol=2e-7, backend=None, **scale):
    leaf = logits.detach().requires_grad_()
    found = kl_kernels.topk_kl(leaf, ids, logprobs, beta=beta, backend=backend, **scale)
    found.sum().backward()
    half_ulp = {torch.bfloat16: 2**-8, torch.float16: 2**-11}.get(logits.dtype, 2e-6)
    for i in range(len(logits)):
        x, expected = truth(logits[i], ids[i], logprobs[i], beta, **scale)
        expected.backward()
        torch.testing.assert_close(found[i].double(), expected.detach(), rtol=rtol, atol=atol)
        torch.testing.assert_close(leaf.grad[i].double(), x.grad, rtol=half_ulp, atol=2e-7)


def some(rows, vocab_size, k, seed=0, spread=3.0):
    """Policy logits, and a teacher's K likeliest tokens with their log-probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab_size, generator=generator) * spread
    teacher = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * spread
    logprobs, ids = teacher.log_softmax(-1).topk(k)
    return logits, ids, logprobs.float()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beta", BETAS)
def test_every_backend_and_dtype(backend, dtype, beta):
    logits, ids, logprobs = some(4, 203, 7)
    assert_right(logits.to(dtype), ids, logprobs, beta, backend=backend, temperature=0.8)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("vocab_size", "k"), [(2, 1), (5, 4), (1025, 64)])
def test_sizes(vocab_size, k, beta):
    assert_right(*some(3, vocab_size, k), beta, softcap=6.0)


@pytest.mark.parametrize("beta", BETAS)
def test_a_policy_that_is_sure_of_itself_keeps_its_tail(beta):
    """1 minus the listed probabilities would be 0 or rounding in float32."""
    logits, ids, logprobs = some(2, 300, 5)
    logits.scatter_(-1, ids[:, :1], 40.0)
    assert_right(logits, ids, logprobs, beta, rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("above", [12, 28, 60])
def test_a_list_that_holds_nearly_everything_leaves_a_tail_its_digits(above, dtype, backend):
    """At 28 nats 1e-12 of the policy is the tail's, while a tenth of the reference is."""
    logits, ids, _ = some(2, 301, 6)
    logits.scatter_(-1, ids, above + torch.randn(2, 6, generator=torch.manual_seed(0)))
    logprobs = torch.randn(2, 6).log_softmax(-1) + math.log(0.9)
    assert_right(logits.to(dtype), ids, logprobs, 0.0, backend=backend)


def test_ids_that_occur_twice_where_nobody_looks_share_a_gradient(monkeypatch):
    logits, ids, logprobs = some(2, 9, 3)
    ids[0, 2] = ids[0, 0]
    monkeypatch.setattr(topk.checks, "values_are_at_hand", lambda tensor: False)
    leaf = logits.requires_grad_()
    kl_kernels.topk_kl(leaf, ids, logprobs).sum().backward()
    assert leaf.grad.sum(-1).abs().max() < 1e-6  # softmax over events, each of them counted


@pytest.mark.parametrize("beta", BETAS)
def test_far_from_zero(beta):
    logits, ids, logprobs = some(2, 300, 5)
    assert_right(logits + 1e4, ids, logprobs, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_a_shorter_list_belongs_to_the_tail(beta):
    logits, ids, logprobs = some(3, 50, 6)
    logprobs[0, 4:] = -torch.inf
    ids[0, 4:] = 0  # any id, even one that is listed
    logprobs[1] = -torch.inf
    assert_right(logits, ids, logprobs, beta)
    alone = kl_kernels.topk_kl(logits[:1], ids[:1, :4], logprobs[:1, :4], beta=beta)
    found = kl_kernels.topk_kl(logits[:1], ids[:1], logprobs[:1], beta=beta)
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-9)
    # Nothing is listed: one event, and no divergence.
    assert kl_kernels.topk_kl(logits[1:2], ids[1:2], logprobs[1:2], beta=beta) < 1e-15


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_whole_vocabulary_gives_the_exact_kl(backend):
    torch.manual_seed(0)
    logits = (torch.randn(2, 3, 40) * 2).requires_grad_()
    ref_logits = torch.randn(2, 3, 40) * 2
    ids = torch.arange(40).expand(2, 3, 40)
    exact = kl_kernels.token_kl(logits, ref_logits, ids[..., 0])
    logprobs = ref_logits.double().log_softmax(-1).float()
    for beta, expected in ((0.0, exact.forward_kl), (1.0, exact.kl)):
        found = kl_kernels.topk_kl(logits, ids, logprobs, beta=beta, backend=backend)
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-6)
        grads = (torch.autograd.grad(x.sum(), logits, retain_graph=True) for x in (found, expected))
        torch.testing.assert_close(*grads, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_more_entries_tell_more(beta):
    """The data processing inequality: merging events never adds to a divergence."""
    logits, ids, _ = some(20, 64, 63)
    logprobs = torch.linspace(-8, 0, 63).double().log_softmax(-1).expand(20, 63) - 1e-3
    found = torch.stack(
        [kl_kernels.topk_kl(logits, ids[:, :k], logprobs[:, :k], beta=beta) for k in range(1, 64)]
    )
    assert (found >= 0).all()
    assert (found.diff(dim=0) >= -1e-6).all()


def test_equal_models_have_none_and_the_gradient_sums_to_zero():
    logits, _, _ = some(4, 90, 5)
    logprobs, ids = logits.double().log_softmax(-1).topk(5)
    leaf = logits.requires_grad_()
    found = kl_kernels.topk_kl(leaf, ids, logprobs.float())
    assert (found >= 0).all()
    assert (found < 1e-7).all()
    found.sum().backward()
    assert leaf.grad.abs().max() < 1e-6
    other = kl_kernels.topk_kl(leaf * 0.5, ids, logprobs.float())
    (grad,) = torch.autograd.grad(other.sum(), leaf)
    assert grad.sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_infinite_where_it_is_infinite(softcap):
    logits = torch.zeros(1, 4, 6)
    ids, logprobs = torch.tensor([[[0, 1]] * 4]), torch.tensor([[[0.4, 0.3]] * 4]).log()
    logits[0, 0, 1] = -torch.inf  # listed, and ruled out by the policy
    logits[0, 1, 2:] = -torch.inf  # nothing but what is listed
    logits[0, 2, :2] = -torch.inf  # all that is listed
    for rows in (slice(4), slice(2)):
        some = logits[:, rows], ids[:, rows], logprobs[:, rows]
        forward = kl_kernels.topk_kl(*some, softcap=softcap)
        assert forward.isinf()[0].tolist() == [True, True, True, False][rows]
        for beta in (0.5, 1.0):
            leaf = some[0].clone().requires_grad_()
            found = kl_kernels.topk_kl(leaf, *some[1:], beta=beta, softcap=softcap)
            found.sum().backward()
            assert found.isfinite().all()
            assert leaf.grad.isfinite().all()
    reverse = kl_kernels.topk_kl(logits, ids, logprobs, beta=1.0, softcap=softcap)
    assert reverse[0, 2].item() == pytest.approx(-math.log(0.3), rel=1e-6)


def test_a_list_that_sums_to_one_leaves_a_policy_without_a_tail_finite():
    logits = torch.tensor([[0.3, -0.2, -torch.inf, -torch.inf, -torch.inf]] * 2)
    logprobs = torch.tensor([[0.6, 0.4]] * 2).log()  # their sum may be off by a rounding
    found = kl_kernels.topk_kl(logits, torch.tensor([[0, 1]] * 2), logprobs)
    p = logits[0, :2].double().softmax(-1)
    assert found.tolist() == pytest.approx(2 * [float(kl([0.6, 0.4], p))], rel=1e-3)


def kl_to_a_list_without_a_tail(sizes):
    """Return the KL of flat policies over 16 tokens to uniform lists of each size."""
    width = max(sizes)
    ids = torch.arange(width).expand(len(sizes), width)
    counts = torch.tensor(sizes)[:, None]
    logprobs = (-counts.double().log()).masked_fill(ids >= counts, -torch.inf).float()
    return kl_kernels.topk_kl(torch.zeros(len(sizes), 16), ids, logprobs, beta=1.0)


def test_a_tail_that_rounding_hides_counts_as_that_rounding_of_its_own_row():
    sizes = [1, 2, 8]
    together = kl_to_a_list_without_a_tail(sizes)
    for size, found in zip(sizes, together.tolist()):
        assert found == pytest.approx(kl_to_a_list_without_a_tail([size]).item(), rel=1e-6)
        policy, tail = size / 16, 1 - size / 16
        # The tail's mass is within 2^-24 and 2^-20, the rounding of a few numbers around 1.
        low, high = (policy * math.log(policy) + tail * math.log(tail / 2**-e) for e in (20, 24))
        assert low < found < high


def test_padded_vocabularies_change_nothing():
    logits, ids, logprobs = some(3, 60, 4)
    padded = torch.nn.functional.pad(logits, (0, 40), value=-torch.inf)
    for beta in BETAS:
        a, b = (x.clone().requires_grad_() for x in (logits, padded))
        one, other = (kl_kernels.topk_kl(x, ids, logprobs, beta=beta) for x in (a, b))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
        one.sum().backward()
        other.sum().backward()
        torch.testing.assert_close(a.grad, b.grad[:, :60], rtol=1e-5, atol=1e-8)
        assert not b.grad[:, 60:].any()


@pytest.mark.parametrize("beta", BETAS)
def test_a_mask_changes_nothing_of_what_it_keeps(beta):
    logits, ids, logprobs = some(4, 30, 5)
    logprobs[:, :2] = -torch.inf  # unlisted entries come first
    ids[0, :2] = torch.arange(30)[~torch.isin(torch.arange(30), ids[0])][:2]
    ids[1] = torch.tensor([3, 3, 99, 99, -1])
    mask = torch.tensor([1, 0, 1, 1])
    a, b = (x.clone().requires_grad_() for x in (logits, logits[mask.bool()]))
    found = kl_kernels.topk_kl(a, ids, logprobs, beta=beta, mask=mask)
    kept = kl_kernels.topk_kl(b, ids[mask.bool()], logprobs[mask.bool()], beta=beta)
    assert_right(*(t[mask.bool()] for t in (logits, ids, logprobs)), beta)
    assert torch.equal(found[mask.bool()], kept)
    assert found[1] == 0
    found.sum().backward()
    kept.sum().backward()
    assert torch.equal(a.grad[mask.bool()], b.grad)
    assert not a.grad[1].any()


def test_masked_rows_are_zero_whatever_they_hold():
    logits, ids, logprobs = some(3, 30, 4)
    logits[1], logprobs[1], ids[1] = torch.nan, torch.nan, -100
    leaf = logits.requires_grad_()
    mask = torch.tensor([True, False, True])
    found = kl_kernels.topk_kl(leaf, ids, logprobs, mask=mask, softcap=9.0)
    found.backward(torch.tensor([1.0, torch.nan, 1.0]))
    assert found[1] == 0
    assert not leaf.grad[1].any()
    assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("beta", BETAS)
def test_gradient_of_float64_is_that_of_finite_differences(beta):
    logits, ids, logprobs = some(3, 9, 4)
    mask = torch.tensor([True, False, True])
    leaf = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: kl_kernels.topk_kl(
            x, ids, logprobs.double(), beta=beta, mask=mask, temperature=1.3, softcap=4.0
        ),
        leaf,
    )


def test_it_compiles_into_one_graph():
    logits, ids, logprobs = some(4, 33, 5)
    compiled = torch.compile(kl_kernels.topk_kl, fullgraph=True)
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    one, other = compiled(a, ids, logprobs), kl_kernels.topk_kl(b, ids, logprobs)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    one.sum().backward()
    other.sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"beta": 1.5}, ValueError, "beta is 1.5"),
        ({"topk_ids": torch.tensor([[1, 1], [2, 3]])}, ValueError, "topk_ids holds 1 twice"),
        ({"topk_ids": [[1, 2], [2, 3]]}, TypeError, "^topk_ids is a list"),
        ({"topk_logprobs": torch.zeros(2)}, ValueError, r"has shape \(2,\), topk_ids \(2, 2\)"),
        ({"backend": "tpu"}, ValueError, "backend is 'tpu'"),
        ({"topk_ids": torch.tensor([[1, 9], [2, 3]])}, ValueError, "topk_ids holds 9"),
        ({"topk_ids": torch.tensor([1, 2])}, ValueError, r"topk_ids has shape \(2,\)"),
        ({"topk_logprobs": torch.zeros(2, 3)}, ValueError, "topk_logprobs has shape"),
        ({"topk_logprobs": torch.zeros(2, 2, dtype=torch.long)}, TypeError, "topk_logprobs has"),
        ({"topk_logprobs": torch.zeros(2, 2, requires_grad=True)}, ValueError, "requires grad"),
    ],
)
def test_bad_arguments_are_named(change, error, said):
    arguments = {
        "topk_ids": torch.tensor([[1, 2], [2, 3]]),
        "topk_logprobs": torch.full((2, 2), -1.0),
    }
    with pytest.raises(error, match=said):
        kl_kernels.topk_kl(torch.zeros(2, 9), **(arguments | change))


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-3), (torch.float16, 2**-6), (torch.bfloat16, 2**-3)]
)
def test_rounding_above_0_counts_as_0_and_more_is_named(dtype, rounding):
    logits, ids = torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([[0]])

    def found(logprob, mask=None):
        logprobs = torch.tensor([[logprob]], dtype=dtype)
        return kl_kernels.topk_kl(logits, ids, logprobs, mask=mask)

    assert torch.equal(found(0.9 * rounding), found(0.0))
    for wrong in (1.1 * rounding, 0.7, torch.inf):
        with pytest.raises(ValueError, match=r"^topk_logprobs holds .* which are at most 0"):
            found(wrong)
        assert found(wrong, torch.tensor([0])) == 0  # masked rows are not checked


def test_above_0_is_nan_in_its_row_where_nobody_looks(monkeypatch):
    logits, ids, logprobs = some(3, 9, 3)
    expected = kl_kernels.topk_kl(logits, ids, logprobs)
    logprobs[1, 2] = 0.7
    monkeypatch.setattr(topk.checks, "values_are_at_hand", lambda tensor: False)
    found = kl_kernels.topk_kl(logits, ids, logprobs)
    assert found[1].isnan()
    assert torch.equal(found[::2], expected[::2])


@pytest.mark.parametrize("beta", BETAS)
def test_a_log_probability_that_is_nan_is_nan_in_its_row(beta):
    logits, ids, logprobs = some(3, 9, 3)
    expected = kl_kernels.topk_kl(logits, ids, logprobs, beta=beta)
    logprobs[1, 2] = torch.nan
    leaf = logits.requires_grad_()
    found = kl_kernels.topk_kl(leaf, ids, logprobs, beta=beta)
    found.sum().backward()
    assert found[1].isnan()
    assert torch.equal(found[::2], expected[::2])
    assert leaf.grad[::2].isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("beta", BETAS)
def test_no_gradient_on_the_way_is_nan(beta):
    """In anomaly mode torch ends at the first one, whether it counts or not."""
    logits, ids, logprobs = some(7, 12, 4)
    logits[0], logprobs[0], ids[0] = torch.nan, torch.nan, -100  # masked
    logprobs[1, 2:] = -torch.inf
    logprobs[2] = -torch.inf
    logits[3, ids[3, 0]] = -torch.inf
    logits[4] = logits[4].where(torch.isin(torch.arange(12), ids[4]), -torch.inf)
    logits[5, ids[5]] = -torch.inf
    mask = torch.arange(7) > 0
    with torch.autograd.detect_anomaly(check_nan=True):
        leaf = logits.requires_grad_()
        found = kl_kernels.topk_kl(leaf, ids, logprobs, beta=beta, mask=mask)
        found[found.isfinite()].sum().backward()
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[0].any()


def test_ids_that_occur_twice_are_found_wherever_they_are():
    ids, logprobs = torch.tensor([[4, 1, 4]]), torch.full((1, 3), -2.0)
    with pytest.raises(ValueError, match="topk_ids holds 4 twice"):
        kl_kernels.topk_kl(torch.zeros(1, 9), ids, logprobs)
    assert kl_kernels.topk_kl(torch.zeros(3, 9), ids.T, logprobs.T).shape == (3,)


def test_second_derivatives_are_refused():
    logits, ids, logprobs = some(2, 9, 3)
    leaf = logits.requires_grad_()
    found = kl_kernels.topk_kl(leaf, ids, logprobs)
    (grad,) = torch.autograd.grad(found.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second"):
        grad.sum().backward()


@pytest.mark.parametrize("beta", BETAS)
def test_rounding_makes_none_negative(beta):
    logits = torch.randn(500, 7, dtype=torch.float64) * 2
    logprobs, ids = logits.log_softmax(-1).topk(3)
    assert (kl_kernels.topk_kl(logits, ids, logprobs, beta=beta) >= 0).all()


@pytest.mark.parametrize("beta", BETAS)
def test_a_sum_that_rounds_to_less_than_one_makes_no_tail_of_a_whole_vocabulary(beta):
    logits = torch.randn(1, 3, generator=torch.Generator().manual_seed(0))
    logprobs = torch.tensor([[0.5, 0.3, 0.199999]]).log()
    ids = torch.tensor([[2, 0, 1]])
    expected = divergence(logits.softmax(-1)[0, ids[0]], logprobs.exp()[0], beta)
    found = kl_kernels.topk_kl(logits, ids, logprobs, beta=beta)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_arguments_may_have_any_strides():
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 17)
    ids = torch.rand(2, 5, 17).topk(3).indices
    logprobs = torch.randn(2, 5, 20).log_softmax(-1)[..., :3]
    expected = kl_kernels.topk_kl(logits, ids, logprobs, beta=0.3)

    def turned(x):
        return x.transpose(0, -1).contiguous().transpose(0, -1)

    for arguments in (
        (logits, ids, turned(logprobs)),
        (logits, turned(ids), logprobs),
        (turned(logits), ids, logprobs),
    ):
        assert torch.equal(kl_kernels.topk_kl(*arguments, beta=0.3), expected)
