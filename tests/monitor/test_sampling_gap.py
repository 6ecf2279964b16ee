"""The sampling gap: what it is by enumeration, what noise makes of it, and when it is told."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist

from kl_kernels import KLMonitor, sampling_gap, token_stats
from kl_kernels.monitor import Limits
from kl_kernels.monitor.sampling_gap import NonzeroGap
from kl_kernels.rl.sampling import GapSums

V, T, EOS = 4, 4, 0  # a tiny language: answers of at most T tokens


def table(seed=0, sharpness=1.5, v=V):
    """Logits [v, v] of the next token after each token."""
    logits = torch.randn(v, v, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return sharpness * logits


def answers():
    """All of them, with a mask through the first EOS; a prompt's last token, 1, comes before."""
    found = {}
    for tokens in itertools.product(range(V), repeat=T):
        n = tokens.index(EOS) + 1 if EOS in tokens else T
        found[tokens[:n] + (EOS,) * (T - n)] = n
    ids = torch.tensor(list(found))
    mask = torch.arange(T) < torch.tensor(list(found.values()))[:, None]
    return ids, mask


def before(ids, first=1):
    """The token that each one comes after."""
    return torch.cat([torch.full_like(ids[:, :1], first), ids[:, :-1]], 1)


def warped(logits, temperature=1.0, top_p=1.0, top_k=None):
    """Logits of what is sampled: log-probabilities with -inf where nothing is."""
    probabilities = (logits / temperature).softmax(-1)
    ordered, order = probabilities.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p
    if top_k:
        kept[..., top_k:] = False
    kept = torch.zeros_like(kept).scatter(-1, order, kept)
    return (logits / temperature).masked_fill(~kept, -torch.inf).log_softmax(-1)


def probability(sampler, ids, mask):  # [N]
    """Return each answer's probability, if tokens are sampled from these logits."""
    logprob = token_stats(sampler[before(ids)], ids, backend="reference").logprob
    return torch.where(mask, logprob, 0.0).sum(1).exp()


def scored(logits, ids, mask):
    """Terms of the gap [N, T]; NaN at what the mask leaves out."""
    stats = token_stats(logits, ids, backend="reference")
    per_token = (x.masked_fill(~mask, torch.nan) for x in (stats.logprob, stats.entropy))
    return tuple(per_token)


def expected_gap(sampler, scorer, *, shift=0):
    """Enumerate the gap of a batch so large that it has its expected number of tokens."""
    ids, mask = answers()
    weight = probability(sampler, ids, mask)
    torch.testing.assert_close(weight.sum(), torch.tensor(1.0, dtype=torch.float64))
    contexts = before(ids) if shift == 0 else ids
    logprob, entropy = scored(scorer[contexts], ids, mask)
    terms = torch.where(mask, -logprob - entropy, 0.0)
    return float((weight * terms.sum(1)).sum() / (weight * mask.sum(1)).sum())


def test_tokens_sampled_from_what_scores_them_have_no_gap():
    for seed in range(5):
        assert abs(expected_gap(table(seed).log_softmax(-1), table(seed))) < 1e-12
        hot = table(seed) / 0.7
        assert abs(expected_gap(warped(table(seed), temperature=0.7), hot)) < 1e-12


def test_the_variance_of_a_sequence_s_sum_is_the_expected_sum_of_squares():
    """Later terms have mean 0 whatever came before, so terms of one sequence do not correlate."""
    ids, mask = answers()
    for seed in range(5):
        weight = probability(table(seed), ids, mask)
        logprob, entropy = scored(table(seed)[before(ids)], ids, mask)
        terms = torch.where(mask, -logprob - entropy, 0.0)
        assert float((weight * terms.sum(1)).sum()) == pytest.approx(0, abs=1e-12)
        by_sequence = (weight * terms.sum(1).square()).sum()
        by_token = (weight * terms.square().sum(1)).sum()
        assert float(by_sequence) == pytest.approx(float(by_token), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_each_mistake_has_its_sign(seed):
    logits = table(seed)
    sampler = logits.log_softmax(-1)
    assert expected_gap(warped(logits, temperature=0.7), logits) < -0.05
    assert expected_gap(warped(logits, temperature=1.4), logits) > 0.05
    assert expected_gap(warped(logits, top_p=0.9), logits) < -0.02
    assert expected_gap(warped(logits, top_k=2), logits) < -0.02
    assert expected_gap(warped(logits, temperature=0.01), logits) < -0.2  # greedy
    assert expected_gap(sampler, logits / 0.7) > 0.05  # scored at a temperature, sampled at 1


def test_off_by_one_and_another_tokenizer_are_far_above():
    """The average of small languages shows it; with four tokens, some wrong rows fit by chance."""
    shifted = [expected_gap(table(s).log_softmax(-1), table(s), shift=1) for s in range(20)]
    assert np.mean(shifted) > 0.4
    permuted = [
        expected_gap(table(s).log_softmax(-1), table(s)[:, [1, 2, 3, 0]]) for s in range(20)
    ]
    assert np.mean(permuted) > 1


def test_a_small_difference_of_temperature_gives_its_share_of_the_varentropy():
    """d/dT E[-log p] at T = 1 is the variance of log p."""
    logits, small = table(3), 1e-5
    ids, mask = answers()
    weight = probability(logits, ids, mask)
    log_p = logits.log_softmax(-1)
    of_rows = (log_p.exp() * log_p.square()).sum(-1) - (log_p.exp() * log_p).sum(-1).square()
    varentropy = torch.where(mask, of_rows[before(ids)], 0.0).sum(1)
    varentropy = float((weight * varentropy).sum() / (weight * mask.sum(1)).sum())
    gap = expected_gap(warped(logits, temperature=1 + small), logits)
    assert gap == pytest.approx(small * varentropy, rel=1e-3)


def test_gap_and_standard_error_are_those_of_loops_over_the_mask():
    ids, mask = answers()
    logprob, entropy = scored(table()[before(ids)], ids, mask)
    terms = [
        float(-p - h) for p, h, m in zip(logprob.flatten(), entropy.flatten(), mask.flatten()) if m
    ]
    gap, error = sampling_gap(logprob.requires_grad_(), entropy, mask.long())
    assert float(gap) == pytest.approx(sum(terms) / len(terms), rel=1e-12)
    assert float(error) == pytest.approx(math.hypot(*terms) / len(terms), rel=1e-12)
    assert gap.dtype == torch.float64
    assert not gap.requires_grad
    assert sampling_gap(logprob.float(), entropy.float(), mask).gap.dtype == torch.float32


def test_without_tokens_gap_and_error_are_zero():
    nothing = torch.full((2, 3), torch.nan)
    assert sampling_gap(nothing, nothing, torch.zeros(2, 3)) == (0, 0)
    assert sampling_gap(nothing[:0], nothing[:0], torch.zeros(0, 3)) == (0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"entropy": torch.zeros(2, 2)}, ValueError, r"entropy has shape \(2, 2\), logprob"),
        ({"mask": torch.zeros(3)}, ValueError, r"mask has shape \(3,\), logprob"),
        ({"logprob": [0.0]}, TypeError, "logprob is a list"),
    ],
)
def test_what_is_not_of_one_shape_is_refused(change, error, message):
    arguments = dict.fromkeys(("logprob", "entropy", "mask"), torch.zeros(2, 3))
    with pytest.raises(error, match=message):
        sampling_gap(**(arguments | change))


def draw(logits, sampler, n_answers, length, seed=0):
    """Tokens [B, T], and for each the token before it."""
    generator = torch.Generator().manual_seed(seed)
    probabilities = sampler.exp()
    last = torch.randint(len(logits), (n_answers, 1), generator=generator)
    tokens = [last]
    for _ in range(length):
        last = torch.multinomial(probabilities[last[:, 0]], 1, generator=generator)
        tokens.append(last)
    tokens = torch.cat(tokens, 1)
    return tokens[:, 1:], tokens[:, :-1]


def batch(rows, ids, logits, temperature=1.0):
    stats = token_stats(logits[rows].float(), ids, temperature=temperature)
    return {
        "logprob": stats.logprob,
        "entropy": stats.entropy,
        "mask": torch.ones_like(ids),
    }


def test_the_standard_error_is_the_spread_over_batches_and_sequences_do_not_cluster():
    logits = table(1, v=30, sharpness=2.0)
    gaps, errors, clustered = [], [], []
    for seed in range(300):
        ids, rows = draw(logits, logits.log_softmax(-1), 20, 10, seed)
        inputs = batch(rows, ids, logits)
        gap, error = sampling_gap(**inputs)
        sums = (-inputs["logprob"] - inputs["entropy"]).double().sum(1)
        gaps.append(float(gap))
        errors.append(float(error))
        clustered.append(float(sums.square().sum().sqrt()) / ids.numel())
    assert np.std(gaps) == pytest.approx(np.mean(errors), rel=0.13)  # three errors of an sd of 300
    assert abs(np.mean(gaps)) < 3.5 * np.mean(errors) / math.sqrt(300)
    assert np.mean(clustered) == pytest.approx(np.mean(errors), rel=0.03)


LANGUAGE = table(2, v=200, sharpness=2.5)  # entropies from 1.2 to 4.2 nats, 2.7 in the mean


def gap_events(inputs, monitor=None, step=1):
    monitor = KLMonitor() if monitor is None else monitor
    return [e for e in monitor.observe(step, kl=0.0, **inputs) if e.kind == "sampling_gap"]


@pytest.mark.parametrize(
    ("n_tokens", "sampling", "shift", "sign", "meaning"),
    [
        (160, {}, 1, 1, "off by one position"),
        (160, {}, -1, 1, "off by one position"),
        (4096, {"temperature": 0.7}, 0, -1, "lower temperature"),
        (4096, {"temperature": 1.4}, 0, 1, "higher temperature"),
        (8192, {"top_p": 0.9}, 0, -1, "top-p"),
        (8192, {"top_k": 10}, 0, -1, "top-k"),
    ],
)
def test_one_batch_shows_each_mistake(n_tokens, sampling, shift, sign, meaning):
    for seed in range(10):
        sampler = warped(LANGUAGE, **sampling)
        ids, rows = draw(LANGUAGE, sampler, n_tokens // 16, 18, seed)
        ids, rows = ids[:, 1:-1], rows[:, 1 + shift : 17 + shift]
        [event] = gap_events(batch(rows, ids, LANGUAGE))
        assert event.value * sign > event.limit * sign > 0
        assert meaning in event.message


def test_the_temperature_of_sampling_given_to_scoring_closes_the_gap():
    ids, rows = draw(LANGUAGE, warped(LANGUAGE, temperature=0.7), 512, 16)
    assert gap_events(batch(rows, ids, LANGUAGE, temperature=0.7)) == []
    assert len(gap_events(batch(rows, ids, LANGUAGE))) == 1


def levels(likely, rare, eps, n):
    """Sums of n tokens, for each number of rare ones, and how probable that is.

    A share eps of the probability lies on `rare` tokens alike, the rest on `likely` ones alike.
    """
    k = np.arange(n + 1)
    log_factorials = np.array([math.lgamma(i + 1) for i in range(n + 1)])
    log_p = log_factorials[n] - log_factorials - log_factorials[::-1]
    log_p += k * math.log(eps) + (n - k) * math.log1p(-eps)
    costs = -math.log((1 - eps) / likely), -math.log(eps / rare)
    entropy = (1 - eps) * costs[0] + eps * costs[1]
    a, b = (cost - entropy for cost in costs)
    sums = [
        GapSums(n, (n - i) * a + i * b, (n - i) * a * a + i * b * b, n * entropy)
        for i in k.tolist()
    ]
    return sums, np.exp(log_p)


def alarm_probability(likely, rare, eps, n):
    limits = Limits()
    sums, p = levels(likely, rare, eps, n)
    told = [
        NonzeroGap(limits.sampling_gap, limits.sampling_gap_nats).observe_sums(0, of_k) is not None
        for of_k in sums
    ]
    assert p.sum() == pytest.approx(1, rel=1e-9)
    return p[told].sum()


@pytest.mark.parametrize(
    ("likely", "rare"), [(1, 150_000), (1, 1000), (1, 1), (150_000, 1), (1000, 1), (2, 150_000)]
)
def test_rare_tokens_that_were_not_drawn_are_no_alarm(likely, rare):
    """Enumeration gives fewer than one batch in 500,000, however rare, for every size of batch."""
    for n in (26, 64, 160, 1000, 4000):
        for eps in np.geomspace(1e-4, 0.5, 12):
            assert alarm_probability(likely, rare, eps, n) < 2e-6, (n, eps)


@pytest.mark.parametrize("shape", [(1, 1), (1, 16), (2, 13), (8, 20), (64, 32)])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0, 8.0])
def test_batches_of_any_size_and_sharpness_raise_no_alarm(shape, sharpness):
    logits = table(4, v=50, sharpness=sharpness)
    monitor = KLMonitor()
    for step in range(40):
        ids, rows = draw(logits, logits.log_softmax(-1), *shape, seed=step)
        assert gap_events(batch(rows, ids, logits), monitor, step) == []


def test_fewer_than_25_tokens_never_alarm():
    for n, told in ((24, 0), (26, 1)):
        tokens = torch.full((1, n), -50.0)  # as far off as can be
        inputs = {"logprob": tokens, "entropy": 0 * tokens, "mask": torch.ones(1, n)}
        assert len(gap_events(inputs)) == told


def test_a_gap_that_one_batch_is_too_small_to_show_is_found_over_several():
    sampler = warped(LANGUAGE, temperature=0.8)
    monitor, told = KLMonitor(), []
    for step in range(40):
        ids, rows = draw(LANGUAGE, sampler, 16, 16, seed=step)
        told += [e.step for e in gap_events(batch(rows, ids, LANGUAGE), monitor, step)]
    assert len(told) == 1
    assert 2 < told[0] < 30


def runs(steps=60):
    """Right at first, wrong for a while, right, and wrong again; a token no row allows, twice."""
    for step in range(steps):
        sampler = LANGUAGE.log_softmax(-1)
        if 10 <= step < 20 or step >= 50:
            sampler = warped(LANGUAGE, temperature=0.5)
        ids, rows = draw(LANGUAGE, sampler, 64, 16, seed=step)
        inputs = batch(rows, ids, LANGUAGE)
        if step in (5, 6, 8):
            inputs["logprob"][3, 4] = -torch.inf
        if step == 7:
            inputs["mask"] = 0 * inputs["mask"]
        if step == 30:
            inputs["logprob"][3, 4] = torch.nan
        yield step, inputs


def test_a_gap_is_told_once_and_again_after_it_was_over():
    monitor = KLMonitor()
    events = [e for step, inputs in runs() for e in gap_events(inputs, monitor, step)]
    impossible = [e.step for e in events if e.value == math.inf]
    assert impossible == [5]  # at 6 and 8 the alarm is not over: step 7 has no tokens
    assert all("probability 0" in e.message for e in events[:1])
    [first, again] = [e for e in events if e.value < math.inf]
    assert 10 <= first.step < 13
    assert 50 <= again.step < 53


def test_tokens_that_scoring_rules_out_are_told_in_words_of_their_own():
    ids, rows = draw(LANGUAGE, LANGUAGE.log_softmax(-1), 8, 16)
    inputs = batch(rows, ids, LANGUAGE)
    inputs["logprob"][0, 0] = -torch.inf
    monitor = KLMonitor()
    [event] = monitor.observe(1, kl=0.0, **inputs)  # and no "non_finite"
    assert event.kind == "sampling_gap"
    assert event.value == math.inf
    assert "probability 0" in event.message
    inputs["mask"][0, 0] = 0
    assert monitor.observe(2, kl=0.0, **inputs) == []
    inputs["mask"][0, 0] = 1
    assert len(monitor.observe(3, kl=0.0, **inputs)) == 1


def test_a_resumed_monitor_goes_on_with_the_gap():
    whole, batches = KLMonitor(), list(runs())
    expected = [e for step, inputs in batches for e in whole.observe(step, kl=0.0, **inputs)]
    for cut in (0, 6, 9, 11, 15, 25, 51):
        first, events = KLMonitor(), []
        monitor = first
        for step, inputs in batches:
            if step == cut:
                monitor = KLMonitor()
                monitor.load_state_dict(json.loads(json.dumps(first.state_dict())))
            events += monitor.observe(step, kl=0.0, **inputs)
        assert list(map(str, events)) == list(map(str, expected))  # a NaN equals no other
        assert monitor.state_dict() == whole.state_dict()


def test_batches_without_tokens_or_with_nan_leave_no_trace():
    monitor = KLMonitor()
    ids, rows = draw(LANGUAGE, LANGUAGE.log_softmax(-1), 64, 16)
    inputs = batch(rows, ids, LANGUAGE)
    monitor.observe(1, kl=0.0, **inputs)
    before = monitor.state_dict()["detectors"]["sampling_gap"]
    nothing = inputs | {"mask": 0 * inputs["mask"]}
    assert monitor.observe(2, kl=0.0, **nothing) == []
    lost = inputs | {"logprob": torch.full_like(inputs["logprob"], torch.nan)}
    [event] = monitor.observe(3, kl=0.0, **lost)
    assert event.kind == "non_finite"
    assert monitor.state_dict()["detectors"]["sampling_gap"] == before


def observe_on_rank(group, name):
    mistaken = name == "mistaken"
    sampler = warped(LANGUAGE, temperature=0.5) if mistaken else LANGUAGE.log_softmax(-1)
    ids, rows = draw(LANGUAGE, sampler, 200, 16)
    own = [slice(0, 30), slice(30, 30), slice(30, 200)][dist.get_rank(group)]
    inputs = {name: x[own] for name, x in batch(rows, ids, LANGUAGE).items()}
    monitor = KLMonitor()
    events = monitor.observe(1, kl=0.0, group=group, **inputs)
    return events, monitor.state_dict(), tuple(sampling_gap(**inputs, group=group))


@pytest.mark.parametrize("name", ["right", "mistaken"])
def test_all_ranks_see_the_gap_of_the_whole_batch(ranks, name):
    found = ranks(observe_on_rank, name, n=3)
    assert all(of_rank == found[0] for of_rank in found)
    events, _, gap = found[0]
    assert len(events) == (name == "mistaken")
    sampler = warped(LANGUAGE, temperature=0.5 if name == "mistaken" else 1.0)
    ids, rows = draw(LANGUAGE, sampler, 200, 16)
    whole = sampling_gap(**batch(rows, ids, LANGUAGE))
    assert [float(x) for x in gap] == pytest.approx([float(x) for x in whole], rel=1e-6)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({}, ValueError, r"logprob has shape \(2, 3\), so it needs entropy"),
        ({"entropy": 1.0}, ValueError, r"logprob has shape \(2, 3\), so it needs entropy"),
        ({"entropy": torch.zeros(2, 3)}, ValueError, "so it needs a mask"),
        ({"logprob": -1.0}, TypeError, "logprob is a float"),
        ({"logprob": torch.zeros(3)}, ValueError, r"logprob has shape \(3,\)"),
    ],
)
def test_a_logprob_without_what_it_is_compared_with_is_refused(inputs, error, message):
    monitor = KLMonitor()
    before = monitor.state_dict()
    with pytest.raises(error, match=message):
        monitor.observe(1, **({"kl": 0.0, "logprob": torch.zeros(2, 3)} | inputs))
    assert monitor.state_dict() == before


def test_limits_of_the_gap_are_the_user_s():
    ids, rows = draw(LANGUAGE, warped(LANGUAGE, temperature=0.7), 512, 16)
    inputs = batch(rows, ids, LANGUAGE)
    [event] = gap_events(inputs)
    assert gap_events(inputs, KLMonitor(limits=Limits(sampling_gap_nats=-1.1 * event.value))) == []
    assert gap_events(inputs, KLMonitor(limits=Limits(sampling_gap=1000.0))) == []
    with pytest.raises(ValueError, match="sampling_gap_nats is -1"):
        Limits(sampling_gap_nats=-1.0)
