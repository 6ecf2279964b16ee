"""Sampled tokens whose probability is 0 on one side or on both: every function, every backend.

Expected values are those of Python's floats, by the one rule: a token that both sides rule out has
a log-ratio of 0 and a ratio of 1, which are constants.
"""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import kl_kernels
from kl_kernels.algebra.epilogues import both_rule_out, k3_of, log_ratio_of
from kl_kernels.integrations import openrlhf, verl
from kl_kernels.lab.ppo.losses import kl_after_update
from kl_kernels.rl.log_ratio import masked_log_ratio

INF, NAN = math.inf, math.nan
BACKENDS = ("reference", "cpu", "triton")
CASES = ("neither", "both", "policy", "reference")  # who rules the sampled token out
F = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: INF if math.isinf(d) else math.exp(-d) - 1 + d,
    "abs": abs,
}
SLOPE = {
    "k1": lambda d: 1.0,
    "k2": lambda d: d,
    "k3": lambda d: 1 - math.exp(-d) if d > -INF else -INF,
    "abs": lambda d: float(d > 0) - float(d < 0),
}
GRADIENTS = ("pathwise", "straight_through", "score_function", "detach")
COMBINATIONS = [c for c in itertools.product(F, GRADIENTS) if c != ("k1", "pathwise")]  # refused


def clip(value, bound):
    return value if bound is None else max(-bound, min(bound, value))


def log_ratio(logprob, other):
    return 0.0 if logprob == other == -INF else logprob - other


def rows(dtype=torch.float32, vocab_size=21, seed=0):
    """[1, 4, V] logits of both models, token ids, and a mask; token t is of CASES[t]."""
    g = torch.Generator().manual_seed(seed)
    logits, ref_logits = (torch.randn(1, 4, vocab_size, generator=g).to(dtype) for _ in range(2))
    token_ids = torch.randint(vocab_size, (1, 4), generator=g)
    for t, case in enumerate(CASES):
        if case in ("both", "policy"):
            logits[0, t, token_ids[0, t]] = -INF
        if case in ("both", "reference"):
            ref_logits[0, t, token_ids[0, t]] = -INF
    return logits, ref_logits, token_ids, torch.ones(1, 4, dtype=torch.bool)


def sampled(logits, token_ids):
    return logits.double().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


def exact_kl(logits, ref_logits):
    p, q = (x.double().log_softmax(-1) for x in (logits, ref_logits))
    return torch.where(p == -INF, 0.0, p.exp() * (p - q)).sum(-1)


def assert_is(found, expected, **tolerance):
    expected = torch.tensor(expected, dtype=torch.float64).view_as(found)
    torch.testing.assert_close(found.detach().double(), expected, **tolerance)


CLOSE = {"rtol": 2e-6, "atol": 2e-6}


def test_the_log_ratio_is_differentiable_where_it_varies_and_constant_where_both_rule_out():
    a = torch.tensor([-1.0, -1.0, -INF, -INF, -1.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([-2.0, -1.0, -INF, -1.0, -INF], dtype=torch.float64)
    with torch.autograd.detect_anomaly(check_nan=True):
        ratio = log_ratio_of(a, b)
        (grad,) = torch.autograd.grad(ratio.sum(), a)
    assert ratio.tolist() == [1.0, 0.0, 0.0, -INF, INF]
    assert grad.tolist() == [1.0, 1.0, 0.0, 1.0, 1.0]  # also of a policy that has not moved
    assert both_rule_out(a, b).tolist() == [False, False, True, False, False]


def test_log_ratio_and_k3_pass_gradcheck():
    a = torch.tensor([-1.0, -0.2, -3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([-1.0, -2.0, -0.1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(log_ratio_of, (a, b))
    assert torch.autograd.gradcheck(lambda a, b: k3_of(log_ratio_of(a, b)), (a, b))
    mask = torch.tensor([True, False, True])
    assert torch.autograd.gradcheck(lambda a: masked_log_ratio(a, b.detach(), mask), (a,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_k3_is_infinite_at_both_ends_and_its_gradient_no_nan(dtype):
    d = torch.tensor([-INF, INF, 0.0, torch.finfo(dtype).min, NAN], dtype=dtype, requires_grad=True)
    value = k3_of(d)
    assert value[:4].tolist() == [INF, INF, 0.0, INF]
    assert value[4].isnan()
    (grad,) = torch.autograd.grad(value.sum(), d)
    assert grad[:3].tolist() == [-INF, 1.0, 0.0]


# kl_penalty


@pytest.mark.parametrize("log_ratio_clamp", [None, 20.0])
@pytest.mark.parametrize("kl_clamp", [None, 10.0])
@pytest.mark.parametrize(("estimator", "gradient"), COMBINATIONS)
def test_kl_penalty_and_its_gradient(estimator, gradient, kl_clamp, log_ratio_clamp):
    logprobs = torch.tensor([-1.0, -INF, -INF, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-3.0, -INF, -2.0, -INF], dtype=torch.float64)
    value = kl_kernels.kl_penalty(
        logprobs,
        ref,
        estimator,
        gradient=gradient,
        kl_clamp=kl_clamp,
        log_ratio_clamp=log_ratio_clamp,
    )
    values, grads = [], []
    for a, b in zip(logprobs.tolist(), ref.tolist()):
        d = clip(log_ratio(a, b), log_ratio_clamp)
        f = clip(F[estimator](d), kl_clamp)
        slope = {
            "pathwise": SLOPE[estimator](d),
            "straight_through": d,
            "score_function": f + SLOPE[estimator](d),
            "detach": None,
        }[gradient]
        values.append(f)
        grads.append(0.0 if a == b == -INF else slope)
    assert_is(value, values, rtol=1e-12, atol=1e-12)
    if gradient != "detach":
        (grad,) = torch.autograd.grad(value.sum(), logprobs)
        assert_is(grad, grads, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("gradient", ["pathwise", "straight_through", "score_function"])
@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
def test_a_token_of_no_weight_adds_nothing_however_far_it_is(estimator, gradient):
    """The policy rules out what an older one sampled: w = 0, and f(d) may be infinite."""
    logprobs = torch.tensor([-INF, -INF, -1.0], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([-2.0, -INF, -1.5], dtype=torch.float64)
    old = torch.tensor([-3.0, -INF, -2.0], dtype=torch.float64)
    value = kl_kernels.kl_penalty(logprobs, ref, estimator, gradient=gradient, old_logprobs=old)
    (grad,) = torch.autograd.grad(value.sum(), logprobs)
    d, w = 0.5, math.e
    f, slope = F[estimator](d), SLOPE[estimator](d)
    slopes = {"pathwise": slope, "straight_through": d, "score_function": f + slope}
    assert_is(value, [0.0, 0.0, w * f], rtol=1e-12, atol=1e-12)
    assert_is(grad, [0.0, 0.0, w * slopes[gradient]], rtol=1e-12, atol=1e-12)


# kl_rewards


def expected_rewards(estimator, kl_coef, kl_clip, logits, ref_logits, token_ids):
    logprob, ref_logprob = (sampled(x, token_ids)[0].tolist() for x in (logits, ref_logits))
    rewards, corrections = [], []
    for a, b, kl in zip(logprob, ref_logprob, exact_kl(logits, ref_logits)[0].tolist()):
        k1 = log_ratio(a, b)
        estimate = clip(kl if estimator == "exact" else F[estimator](k1), kl_clip)
        rewards.append(-kl_coef * estimate)
        k1 = clip(k1, kl_clip)
        owed = 0.0 if k1 == estimate or estimator != "exact" else k1 - estimate
        corrections.append(-kl_coef * owed)
    return rewards, corrections


def assert_rewards_are_right(backend):
    for estimator, kl_clip in itertools.product((*F, "exact"), (None, 5.0)):
        logits, ref_logits, token_ids, mask = rows()
        found = kl_kernels.kl_rewards(
            logits,
            ref_logits,
            token_ids,
            torch.zeros(1),
            mask,
            kl_coef=0.1,
            kl_estimator=estimator,
            kl_clip=kl_clip,
            biased=True,
            backend=backend,
        )
        wanted = expected_rewards(estimator, 0.1, kl_clip, logits, ref_logits, token_ids)
        for value, expected in zip(found[:2], wanted):
            message = f"{estimator} {kl_clip}"
            assert_is(value, expected, **CLOSE, msg=lambda m, of=message: f"{of}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_and_corrections(backend):
    assert_rewards_are_right(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_reward_and_correction_add_up_to_the_k1_reward(backend):
    """Where the reference alone rules the token out, exact KL and k1 are infinite alike."""
    inputs = rows()
    k1, exact = (
        kl_kernels.kl_rewards(
            *inputs[:3],
            torch.zeros(1),
            inputs[3],
            kl_coef=0.1,
            kl_estimator=estimator,
            backend=backend,
        )
        for estimator in ("k1", "exact")
    )
    torch.testing.assert_close(exact.rewards + exact.advantage_correction, k1.rewards, **CLOSE)
    assert k1.rewards[0, 1] == 0


def on_two_ranks(group, inputs, estimator):
    logits, ref_logits, token_ids, mask = inputs
    here = slice(0, 11) if dist.get_rank(group) == 0 else slice(11, None)
    found = kl_kernels.kl_rewards(
        logits[..., here],
        ref_logits[..., here],
        token_ids,
        torch.zeros(1),
        mask,
        kl_coef=0.1,
        kl_estimator=estimator,
        biased=True,
        group=group,
        vocab_start=here.start,
    )
    return found.rewards, found.advantage_correction


@pytest.mark.parametrize("estimator", [*F, "exact"])
def test_sharded_rewards(ranks, estimator):
    inputs = rows()
    wanted = expected_rewards(estimator, 0.1, None, *inputs[:3])
    for of_rank in ranks(on_two_ranks, inputs, estimator, n=2):
        for value, expected in zip(of_rank, wanted):
            assert_is(value, expected, **CLOSE)


# Policy losses


OPTIONS = {
    "clipped": {},
    "dual clip": {"dual_clip": 3.0},
    "k2": {"kl_estimator": "k2", "kl_loss_coef": 0.1},
    "k3": {"kl_estimator": "k3", "kl_loss_coef": 0.1, "log_ratio_clamp": 5.0},
    "k2 as a metric": {"kl_estimator": "k2", "log_ratio_clamp": None, "dual_clip": 3.0},
    "k3 as a metric": {"kl_estimator": "k3", "log_ratio_clamp": None, "dual_clip": 3.0},
}


def composed(logits, token_ids, old, ref_logprobs, advantages, mask, options):
    """The loss as its documentation composes it, with autograd in float64."""
    x = logits.double().requires_grad_()
    logprob = kl_kernels.token_stats(x, token_ids, backend="reference").logprob
    names = ("log_ratio_clamp", "dual_clip")
    clips = {name: options[name] for name in names if name in options}
    loss, metrics = kl_kernels.ppo_policy_loss(logprob, old, advantages, mask, **clips)
    kl = kl_kernels.kl_penalty(
        logprob,
        ref_logprobs,
        options.get("kl_estimator", "k2"),
        log_ratio_clamp=options.get("log_ratio_clamp", 20.0),
    )
    metrics["kl"] = kl_kernels.masked_mean(kl.detach(), mask)
    if coefficient := options.get("kl_loss_coef"):
        loss = loss + coefficient * kl_kernels.masked_mean(kl, mask)
    return loss, metrics, torch.autograd.grad(loss, x)[0]


def assert_policy_losses_are_right(backend, name, sign, case):
    """Against the composition, whose parts are tested by themselves below."""
    logits, ref_logits, token_ids, mask = rows()
    mask[0] = torch.tensor([other in ("neither", case) for other in CASES])
    ref_logprobs = sampled(ref_logits, token_ids).float()
    old = ref_logprobs  # so that each case is one of both ratios
    advantages = torch.full((1, 4), sign)
    expected, expected_metrics, expected_grad = composed(
        logits, token_ids, old, ref_logprobs, advantages, mask, OPTIONS[name]
    )
    leaf = logits.clone().requires_grad_()
    options = OPTIONS[name]
    if "kl_estimator" in options:
        options = {"ref_logprobs": ref_logprobs, **options}
    loss, metrics = kl_kernels.fused_policy_loss(
        leaf, token_ids, old, advantages, mask, backend=backend, **options
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **CLOSE)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=2e-6)
    assert grad.isfinite().all()
    for key in set(metrics) - {"entropy"}:
        torch.testing.assert_close(metrics[key].double(), expected_metrics[key].double(), **CLOSE)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_policy_loss_is_its_composition(backend, name):
    for sign, case in itertools.product((1.0, -1.0), CASES[1:]):
        assert_policy_losses_are_right(backend, name, sign, case)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_that_both_policies_rule_out_has_ratio_1_and_pulls_at_nothing(backend):
    logits, _, token_ids, mask = rows()
    only = torch.zeros_like(mask)
    only[0, CASES.index("both")] = True
    for old in (None, torch.full((1, 4), -INF)):
        leaf = logits.clone().requires_grad_()
        loss, metrics = kl_kernels.fused_policy_loss(
            leaf, token_ids, old, torch.full((1, 4), 2.0), only, backend=backend
        )
        loss.backward()
        assert loss == -2
        assert metrics["ratio_mean"] == metrics["ratio_max"] == 1
        assert metrics["approx_kl"] == metrics["approx_kl_k1"] == 0
        assert not leaf.grad.any()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio_clamp", [None, 20.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_ppo_policy_loss_token_by_token(dual_clip, log_ratio_clamp, sign):
    logprobs = torch.tensor([[-1.0, -INF, -INF, -1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.1, -INF, -2.0, -INF]], dtype=torch.float64)
    for t in range(4):
        mask = torch.zeros(1, 4)
        mask[0, t] = 1
        loss, metrics = kl_kernels.ppo_policy_loss(
            logprobs,
            old,
            torch.full((1, 4), sign),
            mask,
            log_ratio_clamp=log_ratio_clamp,
            dual_clip=dual_clip,
        )
        log = clip(log_ratio(logprobs[0, t].item(), old[0, t].item()), log_ratio_clamp)
        r = math.exp(log) if log < INF else INF
        unclipped, clipped = -sign * r, -sign * min(max(r, 0.8), 1.2)
        expected = max(unclipped, clipped)
        slope = unclipped if unclipped >= clipped else 0.0
        if dual_clip and sign < 0 and expected > dual_clip:
            expected, slope = dual_clip, 0.0
        slope = 0.0 if CASES[t] == "both" else slope
        (grad,) = torch.autograd.grad(loss, logprobs)
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        assert grad[0, t].item() == pytest.approx(slope, rel=1e-12)
        assert grad.count_nonzero() <= 1
        assert metrics["approx_kl"].item() == pytest.approx(F["k3"](-log), rel=1e-9)
        assert metrics["ratio_max"].item() == pytest.approx(r, rel=1e-12)


def test_a_policy_that_has_not_moved_has_the_gradient_of_its_advantages():
    """The ratio is 1 there as well, by a log-ratio of 0 that is no constant."""
    logprobs = torch.tensor([[-1.0, -INF]], requires_grad=True)
    loss, _ = kl_kernels.ppo_policy_loss(
        logprobs, logprobs.detach(), torch.tensor([[3.0, 5.0]]), torch.ones(1, 2), denominator=1
    )
    assert loss == -8
    assert torch.autograd.grad(loss, logprobs)[0].tolist() == [[-3.0, 0.0]]


def test_an_overflowing_ratio_whose_clip_decides_has_no_gradient():
    for logprob in (-1.0, 0.0):
        leaf = torch.full((1, 1), logprob, requires_grad=True)
        loss, _ = kl_kernels.ppo_policy_loss(
            leaf,
            torch.full((1, 1), -200.0),
            torch.ones(1, 1),
            torch.ones(1, 1),
            log_ratio_clamp=None,
        )
        assert loss.item() == pytest.approx(-1.2)
        assert torch.autograd.grad(loss, leaf)[0].item() == 0


# Importance weights


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights(mode, level):
    policy = torch.tensor([[-1.0, -INF], [-INF, -1.0], [-2.0, -1.0]], dtype=torch.float64)
    engine = torch.tensor([[-1.2, -INF], [-2.0, -1.0], [-INF, -1.0]], dtype=torch.float64)
    found, metrics = kl_kernels.importance_weights(
        policy, engine, torch.ones(3, 2), mode=mode, level=level
    )
    low, high = {"truncate": (0.0, 2.0), "mask": (0.5, 5.0)}[mode]

    def bounded(w):
        return min(max(w, low), high) if mode == "truncate" else w * (low <= w <= high < INF)

    w = {
        "token": [[math.exp(0.2), 1.0], [0.0, 1.0], [INF, 1.0]],
        "sequence": [[math.exp(0.2)] * 2, [0.0] * 2, [INF] * 2],
        "geometric": [[math.exp(0.1)] * 2, [0.0] * 2, [INF] * 2],
    }[level]
    wanted = [[0.0 if x == INF and mode == "mask" else bounded(x) for x in row] for row in w]
    assert_is(found, wanted, rtol=1e-12, atol=0)
    assert metrics["k3"] == INF
    outside = sum(not low <= x <= high for row in w for x in row)
    assert metrics["bounded_fraction"].item() == pytest.approx(outside / 6)


# Ruled-out tokens in integrations and losses


def test_trainers_estimators_by_way_of_the_patches():
    a, b = torch.tensor([-1.0, -INF, -INF, -1.0]), torch.tensor([-3.0, -INF, -2.0, -INF])
    verls = verl._kl_penalty(None)
    assert verls(a, b, "k1").tolist() == [2.0, 0.0, -INF, INF]
    assert verls(a, b, "k3").isfinite().all()
    assert verls(a, b, "k3")[1:].tolist() == [0.0, 10.0, 10.0]
    theirs = openrlhf._compute_approx_kl
    assert theirs(a, b).tolist() == [2.0, 0.0, -10.0, 10.0]
    assert theirs(a, b, kl_estimator="k3")[1:].tolist() == [0.0, 10.0, 10.0]
    leaf = a.clone().requires_grad_()
    old = torch.tensor([-1.0, -INF, -1.0, -1.0])
    kl = theirs(leaf, b, old, kl_estimator="k3", unbiased_gradient=True)
    (grad,) = torch.autograd.grad(kl.sum(), leaf)
    assert grad.tolist() == [2.0, 0.0, 0.0, INF]  # the log-ratio times a weight of 1, 1, 0, 1


def test_ppo_measures_no_move_of_what_both_policies_rule_out():
    logits, _, token_ids, mask = rows()
    logprobs = sampled(logits, token_ids).float()
    samples = SimpleNamespace(ids=None, attention_mask=None, answers=token_ids, mask=mask)
    batch = SimpleNamespace(logprobs=logprobs, samples=samples, select=lambda rows: batch)
    ranks = SimpleNamespace(local_rows=lambda n: slice(None), sum=lambda x: x, max=lambda x: x)

    def policy(*_):
        return logits, None

    kl, ratio = kl_after_update(policy, batch, 1, ranks)
    assert kl == pytest.approx(0, abs=1e-9)
    assert ratio == pytest.approx(1, abs=1e-5)
