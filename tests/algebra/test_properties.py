"""Properties of the fused functions' outputs that hold for every row, whatever its logits."""

import math
from itertools import pairwise

import pytest
import torch
from hostile_rows import (
    BACKENDS,
    FINITE,
    KINDS,
    LAYOUTS,
    NEG_INF,
    TOLERANCE,
    Rows,
    assert_outputs_agree,
    evaluate,
    examples,
    generators,
    hostile,
    offsets,
    outputs_of,
    without_offsets,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, pad

import kl_kernels
from kl_kernels.algebra.parts import finish_parts, local_token_ids, merge_parts, pack
from kl_kernels.schemas import STATE_FIELDS

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
DIVERGENCES = ("kl", "forward_kl", "jsd")


@examples
@given(without_offsets, offsets, offsets)
def test_a_constant_added_to_a_models_logits_changes_nothing(backend, rows, shift, ref_shift):
    rows = rows.on(backend)
    moved = Rows(rows.logits + shift, rows.ref_logits + ref_shift, rows.token_ids)
    assert_outputs_agree(outputs_of(moved, backend), outputs_of(rows, backend), backend)


@examples
@given(hostile(), generators)
def test_the_order_of_the_vocabulary_is_of_no_account(backend, rows, g):
    rows = rows.on(backend)
    order = torch.randperm(rows.logits.shape[-1], generator=g)
    permuted = rows.map(lambda x: x[..., order])._replace(token_ids=order.argsort()[rows.token_ids])
    assert_outputs_agree(outputs_of(permuted, backend), outputs_of(rows, backend), backend)


@examples
@given(hostile(), st.integers(1, 70), st.integers(0, 70))
def test_columns_that_both_models_rule_out_change_nothing(backend, rows, before, after):
    rows = rows.on(backend)
    padded = rows.map(lambda x: pad(x, (before, after), value=NEG_INF))
    padded = padded._replace(token_ids=rows.token_ids + before)
    assert_outputs_agree(outputs_of(padded, backend), outputs_of(rows, backend), backend)


@examples
@given(hostile(), st.integers(2, 4))
def test_a_vocabulary_of_copies_has_as_many_more_choices(backend, rows, n):
    rows = rows.on(backend)
    expected = outputs_of(rows, backend)
    for name, sign in (("logprob", -1), ("ref_logprob", -1), ("entropy", 1)):
        expected[name] = expected[name] + sign * math.log(n)
    copies = rows.map(lambda x: x.repeat(1, 1, n))
    assert_outputs_agree(outputs_of(copies, backend), expected, backend)


@examples
@given(hostile(kinds=("equal", "near", "flat", "late-peak", *KINDS)))
def test_divergences_are_never_negative(backend, rows):
    found = outputs_of(rows.on(backend), backend)
    for name in DIVERGENCES:
        assert (found[name] >= 0).all(), name


@examples
@given(hostile())
def test_entropy_is_between_those_of_a_certain_and_of_a_uniform_choice(backend, rows):
    rows = rows.on(backend)
    found = outputs_of(rows, backend)["entropy"]
    choices = (rows.logits > NEG_INF).sum(-1).double()
    assert (found >= 0).all()
    assert (found <= choices.log() + TOLERANCE[backend]).all()


@examples
@given(hostile(), st.floats(0.01, 0.99))
def test_jsd_is_at_most_the_entropy_of_which_model_it_was(backend, rows, beta):
    found = outputs_of(rows.on(backend), backend, beta=beta)["jsd"]
    bound = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert (found <= bound * (1 + TOLERANCE[backend])).all()


@examples
@given(hostile())
def test_kl_is_at_least_twice_the_squared_total_variation(backend, rows):
    """Pinsker's inequality, both ways."""
    p, q = rows.logits.softmax(-1), rows.ref_logits.softmax(-1)
    bound = (p - q).abs().sum(-1).square() / 2
    found = outputs_of(rows.on(backend), backend)
    for name in ("kl", "forward_kl"):
        assert (found[name].double() >= bound - 0.15 * TOLERANCE[backend]).all(), name


@examples
@given(hostile(), st.floats(0.01, 0.99))
def test_models_that_change_places_exchange_their_divergences(backend, rows, beta):
    rows = rows.on(backend)
    found = outputs_of(rows, backend, beta=beta)
    swapped = outputs_of(Rows(rows.ref_logits, rows.logits, rows.token_ids), backend, beta=1 - beta)
    expected = {
        "kl": found["forward_kl"],
        "forward_kl": found["kl"],
        "jsd": found["jsd"],
        "logprob": found["ref_logprob"],
        "ref_logprob": found["logprob"],
    }
    assert_outputs_agree(swapped, expected, backend)


@examples
@given(hostile())
def test_jsd_of_equal_weights_is_symmetric(backend, rows):
    x, y, _ = rows.on(backend)
    there, back = (
        {"jsd": kl_kernels.token_jsd(*pair, beta=0.5, backend=backend)} for pair in ((x, y), (y, x))
    )
    assert_outputs_agree(there, back, backend)


@examples
@given(hostile(), st.floats(0.01, 0.99), st.floats(0.3, 3))
def test_nothing_diverges_from_itself(backend, rows, beta, temperature):
    rows = rows.on(backend)
    itself = rows._replace(ref_logits=rows.logits)
    found = outputs_of(itself, backend, beta=beta, temperature=temperature)
    for name in DIVERGENCES:
        assert (found[name] == 0).all(), name
    assert torch.equal(found["logprob"], found["ref_logprob"])


@examples
@given(hostile(), st.integers(1, 300), generators)
def test_events_merged_into_a_tail_diverge_less(backend, rows, k, g):
    """The data processing inequality; with nothing in the tail it is an equality."""
    rows = rows.on(backend)
    v = rows.logits.shape[-1]
    k = min(k, v)
    ids = torch.rand(rows.logits.shape, generator=g).topk(k).indices
    logprobs = rows.ref_logits.double().log_softmax(-1).gather(-1, ids)
    whole = outputs_of(rows, backend)
    for name, beta in (("forward_kl", 0.0), ("kl", 1.0), ("jsd", 0.3)):
        found = kl_kernels.topk_kl(rows.logits, ids, logprobs, beta=beta, backend=backend)
        slack = TOLERANCE[backend] * (0.15 + whole[name])
        assert (found >= 0).all(), name
        assert (found <= whole[name] + slack).all(), name
        complete = (logprobs > NEG_INF).all(-1) & (k == v)
        assert_outputs_agree({name: found[complete]}, {name: whole[name][complete]}, backend)


@examples
@given(hostile())
def test_logprob_is_minus_torchs_cross_entropy(backend, rows):
    ids = rows.token_ids.flatten()
    expected = {
        name: -cross_entropy(logits.flatten(0, 1), ids, reduction="none").view(2, 2)
        for name, logits in (("logprob", rows.logits), ("ref_logprob", rows.ref_logits))
    }
    assert_outputs_agree(outputs_of(rows.on(backend), backend), expected, backend)


@examples
@given(hostile(kinds=("policy-out", *FINITE)))
def test_kl_is_cross_entropy_minus_entropy(backend, rows):
    found = outputs_of(rows.on(backend), backend)
    p, log_q = rows.logits.softmax(-1), rows.ref_logits.log_softmax(-1)
    cross = -torch.where(p > 0, p * log_q, 0.0).sum(-1)
    total = found["kl"].double() + found["entropy"].double()
    torch.testing.assert_close(total, cross, rtol=TOLERANCE[backend], atol=TOLERANCE[backend])


@examples
@given(hostile(), st.floats(0.3, 3))
def test_probabilities_of_all_tokens_add_up_to_one(backend, rows, temperature):
    logits = rows.on(backend).logits
    everything = torch.arange(logits.shape[-1]).expand(logits.shape)
    found = kl_kernels.selective_log_softmax(logits, everything, temperature, backend=backend)
    total = found.double().exp().sum(-1)
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=TOLERANCE[backend], atol=TOLERANCE[backend]
    )


@examples
@given(hostile(), st.lists(st.booleans(), min_size=4, max_size=4), generators)
def test_a_row_is_the_same_bits_whatever_surrounds_it(backend, rows, mask, g):
    """Other rows, garbage under the mask, the batch it comes in."""
    rows, mask = rows.on(backend), torch.tensor(mask).view(2, 2)
    outside = ~mask[..., None]
    masked = rows.map(lambda x: x.masked_fill(outside, torch.nan))
    masked = masked._replace(token_ids=rows.token_ids.masked_fill(~mask, -100))
    alone, among = evaluate(rows, backend), evaluate(masked, backend, mask=mask)
    order = torch.randint(2, (5,), generator=g)
    repeated = evaluate(Rows(*(t[order] for t in rows)), backend)
    for whole, part, copies in zip(alone, among, repeated):
        for name, value in whole.items():
            kept = mask if value.ndim == 2 else ~outside
            assert (part[name].masked_select(~kept) == 0).all(), name
            assert same(part[name], torch.where(kept, value, 0.0), backend), name
            assert same(copies[name], value[order], backend), name


def same(a, b, backend):
    """Bit by bit, but for the reference: torch's exp2 rounds by the place in the tensor."""
    if backend == "reference":
        return torch.allclose(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)
    return torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


@examples
@given(hostile(), st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))
def test_a_row_is_the_same_bits_however_it_lies_in_memory(backend, rows, layout, ref_layout):
    rows = rows.on(backend)
    laid_out = Rows(layout(rows.logits), ref_layout(rows.ref_logits), rows.token_ids)
    found, expected = evaluate(laid_out, backend), evaluate(rows, backend)
    for ours, theirs in zip(found, expected):
        for name, value in theirs.items():
            assert same(ours[name], value, backend), name


@examples
@given(hostile(), st.lists(st.integers(0, 257), max_size=5), st.randoms(use_true_random=False))
def test_parts_merge_into_the_whole_in_any_order_and_grouping(backend, rows, cuts, random):
    rows = rows.on(backend)
    v = rows.logits.shape[-1]
    bounds = [0, *sorted({c for c in cuts if 0 < c < v}), v]
    states = [fold_part(rows, a, b, backend) for a, b in pairwise(bounds)]
    random.shuffle(states)
    at_once = merge_parts(torch.stack(states))
    dtype = states[0].dtype
    while len(states) > 1:
        n = random.randint(2, len(states))
        some = merge_parts(torch.stack(states[:n]))
        states[:n] = [pack(some, has_ref=True, dtype=torch.float64)]
        random.shuffle(states)
    expected = outputs_of(rows, backend)
    del expected["jsd"]
    for whole in (merge_parts(torch.stack(states)), at_once):
        found = finish_parts(whole, None, dtype).outputs._asdict()
        assert_outputs_agree(found, expected, backend)


def fold_part(rows, start, end, backend):
    x, y, token_ids = rows
    ids = local_token_ids(token_ids, start, end - start)
    state = torch.ops.kl_kernels.fold_part(
        x[..., start:end], y[..., start:end], ids, None, 1.0, 1.0, None, None, backend
    )
    assert len(state) == len(STATE_FIELDS)
    return state


@examples
@given(without_offsets, st.integers(1, 8))
def test_temperature_divides_the_logits(backend, rows, temperature):
    rows = rows.on(backend)
    multiplied = rows.map(lambda x: x * temperature)
    found = outputs_of(multiplied, backend, temperature=float(temperature))
    assert_outputs_agree(found, outputs_of(rows, backend), backend)


@examples
@given(hostile(kinds=tuple(FINITE), sizes=(2, 5, 31)))
def test_k1_and_k3_are_the_exact_kl_on_average(backend, rows):
    """The average is over all tokens, each with the policy's probability."""
    log_p, log_q = (x.flatten(0, 1).log_softmax(-1) for x in rows[:2])  # [4, V]
    p = log_p.exp()
    exact = outputs_of(rows.on(backend), backend)["kl"].flatten().double()
    for estimator in ("k1", "k3"):
        kl = kl_kernels.kl_penalty(log_p, log_q, estimator, mask=p > 0)
        mean = (p * kl).sum(-1)
        torch.testing.assert_close(mean, exact, rtol=TOLERANCE[backend], atol=TOLERANCE[backend])
