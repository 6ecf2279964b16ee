"""Statistics over kept sets: full rows in float64, with -inf outside of the set, are the truth."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kl_kernels
from kl_kernels import Support

BACKENDS = ("reference", "cpu", "triton")
SCALES = {"temperature": 0.7, "ref_temperature": 1.3, "softcap": 6.0, "ref_softcap": 9.0}
INF = torch.inf


def random_case(b=2, t=7, v=131, dtype=torch.float32, seed=0, sizes=(0, 1, 2, 5, 131), holes=0.2):
    """Logits of two models, sets of several sizes in any order, tokens of them, and a mask.

    Masked rows hold NaN, and nothing is promised of their sets.
    """
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = (torch.randn(2, b, t, v, generator=g) * 2).to(dtype)
    mask = torch.rand(b, t, generator=g) >= holes
    mask[0, 0] = True
    sets = [torch.randperm(v, generator=g)[: sizes[i % len(sizes)]].tolist() for i in range(b * t)]
    token_ids = torch.tensor([kept[0] if kept else v // 2 for kept in sets]).view(b, t)
    token_ids[~mask] = 0
    logits[~mask] = torch.nan
    return logits, ref_logits, token_ids, mask, support_of(sets)


def support_of(sets):
    ends = torch.tensor([0, *map(len, sets)]).cumsum(0)
    return Support(torch.tensor([i for kept in sets for i in kept], dtype=torch.int64), ends)


def sets_of(support):
    ends = support.offsets.tolist()
    return [support.token_ids[a:b].tolist() for a, b in pairwise(ends)]


def log_softmax_over(logits, sets, temperature, softcap):
    """Float64 log-softmax of full rows, with -inf outside of each row's set."""
    z = logits.double()
    if softcap is not None:
        z = torch.where(z.isinf(), z, softcap * torch.tanh(z / softcap))
    z = z / temperature
    outside = torch.zeros_like(z, dtype=torch.bool)
    for row, kept in zip(outside.flatten(0, -2), sets, strict=True):
        if kept:
            row[:] = True
            row[kept] = False
    return z.masked_fill(outside, -INF).log_softmax(-1)


def truth(
    logits, ref_logits, token_ids, support, *, temperature=1.0, ref_temperature=None,
    softcap=None, ref_softcap=None, ref_support="same",
):  # fmt: skip
    """Every statistic, by loops over nothing but full rows."""
    sets = sets_of(support)
    p = log_softmax_over(logits, sets, temperature, softcap)
    ref_sets = sets if ref_support == "same" else [[]] * len(sets)
    ref_temperature = temperature if ref_temperature is None else ref_temperature
    q = log_softmax_over(ref_logits, ref_sets, ref_temperature, ref_softcap)

    def weighed(a, b):
        """Sum exp(a) b, where exp(a) = 0 weighs nothing."""
        return (a.exp() * b.masked_fill(a == -INF, 0.0)).sum(-1)

    # Without NaN in the gradient: entries that weigh nothing are constants.
    p0, q0 = p.masked_fill(p == -INF, 0.0), q.masked_fill(q == -INF, 0.0)
    forward_kl = torch.where(
        ((p == -INF) & (q > -INF)).any(-1), INF, weighed(q, (q0 - p0).masked_fill(p == -INF, 0.0))
    )
    return kl_kernels.TokenKL(
        logprob=p.gather(-1, token_ids[..., None])[..., 0],
        ref_logprob=q.gather(-1, token_ids[..., None])[..., 0],
        kl=weighed(p, p0 - q0),
        forward_kl=forward_kl,
        entropy=-weighed(p, p0),
    )


def kept_rows(gradient, mask):
    """Rows outside of the mask, in which the truth may have 0 times infinity, have no gradient."""
    return gradient.masked_fill(~mask[..., None], 0.0)


def tolerance(dtype):
    return {"rtol": 3e-6, "atol": 2e-6} if dtype != torch.float64 else {"rtol": 1e-9, "atol": 1e-11}


def half_ulp(dtype):
    return {torch.bfloat16: 2**-8, torch.float16: 2**-10}.get(dtype, 1e-5)


def assert_kl_is_right(case, weights=(1.0, 0.7, 0.3, -0.4), backend=None, **options):
    """Statistics and the gradient of a mix of them, against the truth; masked rows are 0."""
    logits, ref_logits, token_ids, mask, support = case
    leaf = logits.detach().clone().requires_grad_()
    found = kl_kernels.token_kl(
        leaf, ref_logits, token_ids, mask, support=support, backend=backend, **options
    )
    exact = logits.detach().double().masked_fill(~mask[..., None], 0.0).requires_grad_()
    expected = truth(exact, ref_logits, token_ids, support, **options)
    for name, one, other in zip(found._fields, found, expected):
        torch.testing.assert_close(
            one.double(), other.masked_fill(~mask, 0.0), **tolerance(logits.dtype), msg=name
        )
    fields = ("logprob", "kl", "entropy", "forward_kl")

    def mixed(out):
        terms = [w * getattr(out, name) for w, name in zip(weights, fields) if w]
        return sum(torch.where(mask & term.isfinite(), term, 0.0).sum() for term in terms)

    mixed(found).backward()
    mixed(expected).backward()
    ulp = half_ulp(logits.dtype)
    torch.testing.assert_close(
        leaf.grad.double(), kept_rows(exact.grad, mask), rtol=ulp, atol=ulp * 0.1
    )


@pytest.mark.parametrize("ref_support", ["same", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_backend_and_dtype(dtype, backend, ref_support):
    case = random_case(dtype=dtype)
    assert_kl_is_right(case, backend=backend, ref_support=ref_support, **SCALES)


@pytest.mark.parametrize("ref_support", ["same", "full"])
@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)])
def test_each_gradient_alone_in_float64(weights, ref_support):
    case = random_case(dtype=torch.float64, v=23, sizes=(0, 1, 2, 9, 23))
    assert_kl_is_right(case, weights, ref_support=ref_support, **SCALES)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("ref_support", ["same", "full"])
def test_logits_far_from_0(offset, ref_support):
    logits, ref_logits, *rest = random_case()
    case = (logits + offset, ref_logits - offset, *rest)
    assert_kl_is_right(case, backend="cpu", ref_support=ref_support)


def test_ruled_out_logits_inside_a_set():
    logits, ref_logits, token_ids, mask, support = random_case(sizes=(5, 9))
    for row, kept in enumerate(sets_of(support)):
        logits.view(-1, logits.shape[-1])[row, kept[1]] = -INF
        ref_logits.view(-1, logits.shape[-1])[row, kept[1]] = -INF
    assert_kl_is_right((logits, ref_logits, token_ids, mask, support))


def test_a_reference_that_rules_the_whole_set_out_makes_the_kl_infinite():
    support = support_of([[0, 1]])
    ref_logits = torch.tensor([[-INF, -INF, 1.0]])
    logits = torch.zeros(1, 3, requires_grad=True)
    ids = torch.tensor([0])
    out = kl_kernels.token_kl(logits, ref_logits, ids, support=support, ref_support="full")
    assert out.kl.item() == INF
    assert out.ref_logprob.item() == -INF
    (out.logprob + out.entropy).sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_nan_stays_alone(backend):
    logits, ref_logits, token_ids, _, support = random_case(sizes=(3, 0), holes=0)
    expected = kl_kernels.token_kl(logits, ref_logits, token_ids, support=support, backend=backend)
    logits[0, 2, sets_of(support)[2][1]] = torch.nan
    found = kl_kernels.token_kl(logits, ref_logits, token_ids, support=support, backend=backend)
    others = torch.ones_like(token_ids, dtype=torch.bool)
    others[0, 2] = False
    for one, other in zip(found, expected):
        assert torch.equal(one[others], other[others])
    assert found.kl[0, 2].isnan()
    assert found.logprob[0, 2].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_stats_are_those_of_the_pair(backend):
    logits, ref_logits, token_ids, mask, support = random_case()
    pair = kl_kernels.token_kl(
        logits, ref_logits, token_ids, mask, support=support, backend=backend
    )
    leaf = logits.clone().requires_grad_()
    stats = kl_kernels.token_stats(leaf, token_ids, mask, support=support, backend=backend)
    torch.testing.assert_close(stats.logprob, pair.logprob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(stats.entropy, pair.entropy, rtol=1e-6, atol=1e-6)
    selected = kl_kernels.selective_log_softmax(
        leaf, token_ids, row_mask=mask, support=support, backend=backend
    )
    assert torch.equal(selected, stats.logprob)


@pytest.mark.parametrize("ref_support", ["same", "full"])
@pytest.mark.parametrize("estimator", ["k1", "exact"])
def test_rewards(estimator, ref_support):
    logits, ref_logits, token_ids, mask, support = random_case()
    scores = torch.tensor([1.5, -2.0])
    found = kl_kernels.kl_rewards(
        logits, ref_logits, token_ids, scores, mask, kl_coef=0.3, kl_estimator=estimator,
        support=support, ref_support=ref_support, **SCALES,
    )  # fmt: skip
    clean = logits.masked_fill(~mask[..., None], 0.0)
    t = truth(clean, ref_logits, token_ids, support, ref_support=ref_support, **SCALES)
    k1 = t.logprob - t.ref_logprob
    expected = torch.where(mask, -0.3 * (k1 if estimator == "k1" else t.kl), 0.0)
    correction = torch.where(mask, -0.3 * (k1 - t.kl), 0.0) * (estimator == "exact")
    for row in range(2):
        expected[row, mask[row].nonzero().max()] += scores[row]
    torch.testing.assert_close(found.rewards.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found.advantage_correction.double(), correction, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(found.kl.double(), t.kl.masked_fill(~mask, 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl_estimator", ["exact", "k2", "k3"])
@pytest.mark.parametrize("ref_support", ["same", "full"])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_the_policy_loss(inplace_backward, ref_support, kl_estimator):
    logits, ref_logits, token_ids, mask, support = random_case()
    g = torch.Generator().manual_seed(3)
    advantages = torch.randn(token_ids.shape, generator=g)
    exact = logits.double().masked_fill(~mask[..., None], 0.0).requires_grad_()
    t = truth(exact, ref_logits, token_ids, support, ref_support=ref_support, **SCALES)
    old = (t.logprob.detach() + 0.2 * torch.randn(token_ids.shape, generator=g)).clamp_max(0.0)
    ratio = (t.logprob - old).exp()
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.2))
    d = t.logprob - t.ref_logprob
    kl = {"exact": t.kl, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kl_estimator]
    loss = (loss + 0.3 * kl - 0.1 * t.entropy)[mask].mean()
    loss.backward()
    leaf = logits.clone().requires_grad_()
    found, metrics = kl_kernels.fused_policy_loss(
        leaf if not inplace_backward else leaf * 1.0, token_ids, old, advantages, mask,
        ref_logits=ref_logits, kl_loss_coef=0.3, kl_estimator=kl_estimator, entropy_coef=0.1,
        support=support, ref_support=ref_support, inplace_backward=inplace_backward, **SCALES,
    )  # fmt: skip
    found.backward()
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        leaf.grad.double(), kept_rows(exact.grad, mask), rtol=1e-4, atol=1e-6
    )
    expected_ratio = ratio[mask].mean().detach().float()
    torch.testing.assert_close(metrics["ratio_mean"], expected_ratio, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        metrics["kl"].double(), kl[mask].mean().detach(), rtol=1e-5, atol=1e-6
    )


def test_a_gradient_in_place_is_the_same():
    logits, ref_logits, token_ids, mask, support = random_case()
    grads = []
    for inplace_backward in (False, True):
        leaf = logits.clone().requires_grad_()
        own = leaf * 1.0
        out = kl_kernels.token_kl(
            own, ref_logits, token_ids, mask, support=support, inplace_backward=inplace_backward
        )
        (out.logprob + out.kl).sum().backward()
        grads.append(leaf.grad)
        assert torch.equal(own, leaf) == (not inplace_backward) or own.isnan().any()
    assert torch.equal(*grads)


def test_views_are_read_where_they_are():
    logits, ref_logits, token_ids, _, support = random_case(holes=0)
    logits = torch.randn(logits.shape[0], logits.shape[1] + 1, logits.shape[2]).requires_grad_()
    view = logits[:, :-1]
    found = kl_kernels.token_kl(view, ref_logits, token_ids, support=support)
    copy = kl_kernels.token_kl(view.contiguous(), ref_logits, token_ids, support=support)
    assert all(torch.equal(*pair) for pair in zip(found, copy))
    one, other = (torch.autograd.grad(out.kl.sum(), logits)[0] for out in (found, copy))
    assert torch.equal(one, other)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12), st.sampled_from(["same", "full"]))
def test_properties(seed, v, ref_support):
    sizes = (0, 1, max(1, v // 2), v)
    logits, ref_logits, token_ids, mask, support = random_case(2, 4, v, seed=seed, sizes=sizes)
    leaf = logits.clone().requires_grad_()

    def kl(kept, **options):
        out = kl_kernels.token_kl(leaf, ref_logits, token_ids, mask, support=kept, **options)
        (grad,) = torch.autograd.grad((out.logprob + out.entropy + out.kl).sum(), leaf)
        return out, grad

    out, grad = kl(support, ref_support=ref_support)
    sets = sets_of(support)
    turned, turned_grad = kl(support_of([kept[::-1] for kept in sets]), ref_support=ref_support)
    for one, other in zip((*out, grad), (*turned, turned_grad)):  # the order of a set is nothing
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)

    listed_fully, _ = kl(support_of([kept or list(range(v)) for kept in sets]))
    in_short, _ = kl(support_of([[] if len(kept) == v else kept for kept in sets]))
    for one, other in zip(listed_fully, in_short):  # the whole vocabulary, listed or not
        torch.testing.assert_close(one, other, rtol=1e-5, atol=2e-6)

    alone = torch.tensor([len(kept) == 1 for kept in sets]).view_as(mask)
    same, same_grad = kl(support)
    for value in (same.logprob, same.entropy, same.kl):  # a token without a choice
        assert (value[alone] == 0).all()
    assert (same_grad[alone] == 0).all()

    full, full_grad = kl(support, ref_support="full")
    q = ref_logits.double().softmax(-1).flatten(0, 1)
    share = torch.stack([row[kept].sum() if kept else row.sum() for row, kept in zip(q, sets)])
    more = -share.log().view_as(mask).masked_fill(~mask, 0.0)
    torch.testing.assert_close((full.kl - same.kl).double(), more, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(full_grad, same_grad)

    outside = torch.ones_like(logits, dtype=torch.bool).flatten(0, 1)
    for row, kept in zip(outside, sets):
        row[kept or slice(None)] = False
    assert (grad.flatten(0, 1)[outside] == 0).all()


def test_gradcheck():
    case = random_case(1, 5, 6, torch.float64, sizes=(0, 1, 2, 4, 6), holes=0)
    logits, ref_logits, token_ids, _, support = case
    logits.requires_grad_()

    def outputs(x):
        out = kl_kernels.token_kl(x, ref_logits, token_ids, support=support, **SCALES)
        return out.logprob, out.kl, out.forward_kl, out.entropy

    assert torch.autograd.gradcheck(outputs, (logits,))


def test_there_is_no_second_derivative():
    logits, ref_logits, token_ids, _, support = random_case(holes=0)
    logits.requires_grad_()
    out = kl_kernels.token_kl(logits, ref_logits, token_ids, support=support)
    (grad,) = torch.autograd.grad(out.kl.sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grad.sum().backward()


def test_no_tokens():
    empty = torch.zeros(0, 5), torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64)
    out = kl_kernels.token_kl(*empty, support=Support.from_padded(torch.zeros(0, 2).long()))
    assert out.kl.shape == (0,)


@pytest.mark.parametrize("ref_support", ["same", "full"])
def test_a_token_outside_of_its_set_where_nobody_looks(ref_support, monkeypatch):
    """As on a GPU, where looking would synchronise: -inf, and no NaN anywhere."""
    monkeypatch.setattr("kl_kernels.checks.values_are_at_hand", lambda _: False)
    logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
    ref_logits = torch.tensor([[1.0, 1.0, 1.0]])
    out = kl_kernels.token_kl(
        logits, ref_logits, torch.tensor([2]), support=support_of([[0, 1]]), ref_support=ref_support
    )
    assert out.logprob.item() == -INF
    assert out.ref_logprob.item() == pytest.approx(-INF if ref_support == "same" else -1.0986123)
    (out.logprob + out.kl + out.entropy).sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 2] == 0


def test_what_is_no_token_where_nobody_looks_makes_its_row_nan(monkeypatch):
    monkeypatch.setattr("kl_kernels.checks.values_are_at_hand", lambda _: False)
    kept = support_of([[0, 99], [1, -5], [0, 1]])
    logits = torch.zeros(3, 3, requires_grad=True)
    out = kl_kernels.token_stats(logits, torch.tensor([0, 1, 1]), support=kept)
    assert out.logprob.isnan().tolist() == [True, True, False]
    out.logprob[2].backward()
    assert logits.grad[2].tolist() == [-0.5, 0.5, 0.0]


def call(**changed):
    logits, ref_logits, token_ids, mask, support = random_case()
    kept = {"support": support, **changed}
    return kl_kernels.token_kl(logits, ref_logits, token_ids, mask, **kept)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"support": [1]}, "support is a list; it must be a kl_kernels.Support"),
        ({"support": support_of([[1]])}, "support has 1 rows, token_ids 14 tokens"),
        ({"support": support_of([[]] * 14).to("meta")}, "support is on meta"),
        ({"support": support_of([[3]] * 7 + [[3, 131]] * 7)}, "support holds 131 in row 7;.* 130"),
        ({"support": support_of([[3, 5]] * 14)}, "token_ids holds .* in row 0, which is not in"),
        ({"ref_support": "all"}, "ref_support"),
    ],
)
def test_what_does_not_go_with_the_logits_is_named(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(**changed)


def test_a_group_and_several_tokens_are_refused_by_name():
    logits, _, token_ids, mask, support = random_case()
    with pytest.raises(ValueError, match="support is given with a group"):
        kl_kernels.token_stats(logits, token_ids, mask, support=support, group=object())
    with pytest.raises(ValueError, match="support is given, but index of shape"):
        kl_kernels.selective_log_softmax(logits, token_ids[..., None], support=support)


def test_compiled_in_one_graph():
    logits, ref_logits, token_ids, mask, support = random_case()

    def loss(x):
        out = kl_kernels.token_kl(
            x, ref_logits, token_ids, mask, support=support, ref_support="full"
        )
        policy_loss, _ = kl_kernels.fused_policy_loss(
            x, token_ids, None, torch.ones_like(out.kl), mask, support=support
        )
        return (out.logprob + out.kl).sum() + policy_loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = logits.clone().requires_grad_()
        value = function(leaf)
        value.backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("ref_is_whole", [False, True])
def test_torch_takes_the_operator(ref_is_whole):
    logits, ref_logits, token_ids, mask, support = random_case(1, 5, 8, torch.float64)
    args = (
        logits.nan_to_num(0.0).requires_grad_(), ref_logits, token_ids, mask, support.token_ids % 8,
        support.offsets, ref_is_whole, 0.7, 0.9, None, 5.0, False, None,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.kl_kernels.kept_kl.default, args)
    logits, *constants = args[:6]
    share = torch.rand(1, 5, dtype=torch.float64)
    grads = *torch.rand(2, 1, 5, dtype=torch.float64), None, share
    backward = (*grads, logits.detach(), *constants, ref_is_whole, share, *args[7:11])
    torch.library.opcheck(torch.ops.kl_kernels.kept_kl_backward.default, backward)


def test_forward_kl_to_a_whole_reference_is_infinite_with_the_gradient_p_minus_q():
    logits = torch.zeros(1, 3, requires_grad=True)
    ref_logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    kept = {"support": support_of([[0, 1]]), "ref_support": "full"}
    out = kl_kernels.token_kl(logits, ref_logits, torch.tensor([0]), **kept)
    assert out.forward_kl.item() == INF
    out.forward_kl.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5 - 0.5, 0.5 - 0.25, 0.0]]))
