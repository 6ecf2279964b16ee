"""Properties of gradients that hold for every row, whatever its logits."""

import pytest
import torch
from hostile_rows import (
    BACKENDS,
    DIFFERENTIABLE,
    FINITE,
    KINDS,
    NEG_INF,
    Rows,
    assert_gradient_agrees,
    assert_gradients_agree,
    evaluate,
    examples,
    generators,
    hostile,
    offsets,
    sizes_of,
    without_offsets,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad

import kl_kernels

pytestmark = pytest.mark.parametrize("backend", BACKENDS)
finite = hostile(kinds=("policy-out", *FINITE))


@examples
@given(without_offsets, offsets, offsets)
def test_a_constant_added_to_a_models_logits_changes_no_gradient(backend, rows, shift, ref_shift):
    rows = rows.on(backend)
    moved = Rows(rows.logits + shift, rows.ref_logits + ref_shift, rows.token_ids)
    expected = evaluate(rows, backend)
    found = evaluate(moved, backend)
    size = sizes_of(expected.outputs)
    assert_gradients_agree(found.gradients, expected.gradients, backend, size)


@examples
@given(hostile(), generators)
def test_gradients_move_along_with_their_columns(backend, rows, g):
    rows = rows.on(backend)
    order = torch.randperm(rows.logits.shape[-1], generator=g)
    permuted = rows.map(lambda x: x[..., order])._replace(token_ids=order.argsort()[rows.token_ids])
    outputs, expected = evaluate(rows, backend)
    expected = {name: gradient[..., order] for name, gradient in expected.items()}
    found = evaluate(permuted, backend).gradients
    assert_gradients_agree(found, expected, backend, sizes_of(outputs))


@examples
@given(finite, st.integers(1, 70), st.integers(0, 70))
def test_columns_that_both_models_rule_out_have_no_gradient(backend, rows, before, after):
    rows = rows.on(backend)
    padded = rows.map(lambda x: pad(x, (before, after), value=NEG_INF))
    padded = padded._replace(token_ids=rows.token_ids + before)
    outputs, expected = evaluate(rows, backend)
    found = evaluate(padded, backend).gradients
    for name, gradient in found.items():
        assert (gradient[..., :before] == 0).all(), name
        assert (gradient[..., before + rows.logits.shape[-1] :] == 0).all(), name
    inside = slice(before, before + rows.logits.shape[-1])
    found = {name: gradient[..., inside] for name, gradient in found.items()}
    assert_gradients_agree(found, expected, backend, sizes_of(outputs))


@examples
@given(finite, st.floats(0.3, 3))
def test_a_gradient_adds_up_to_zero_over_the_vocabulary(backend, rows, temperature):
    """No output depends on a constant that is added to all logits."""
    outputs, gradients = evaluate(rows.on(backend), backend, temperature=temperature)
    size = sizes_of(outputs) / temperature
    for name, gradient in gradients.items():
        total = gradient.double().sum(-1, keepdim=True)
        assert_gradient_agrees(total, torch.zeros_like(total), backend, size, name)


@examples
@given(hostile(), generators)
def test_gradients_are_linear_in_what_comes_from_above(backend, rows, g):
    """Gradients of all outputs together are the sum of each output's own."""
    rows = rows.on(backend)
    weights = {
        name: torch.randn(2, 2, generator=g, dtype=rows.logits.dtype) for name in DIFFERENTIABLE
    }
    outputs, gradients = evaluate(rows, backend)
    size = sizes_of(outputs)
    scaled = evaluate(rows, backend, weights).gradients
    expected = {n: w[..., None] * gradients[n] for n, w in weights.items()}
    assert_gradients_agree(scaled, expected, backend, 4 * size)
    logits = rows.logits.detach().requires_grad_()
    found = kl_kernels.token_kl(logits, *rows[1:], backend=backend)._asdict()
    names = ("logprob", "kl", "forward_kl", "entropy")
    (together,) = torch.autograd.grad(
        [found[n] for n in names], logits, [weights[n] for n in names]
    )
    total = torch.stack([expected[n] for n in names]).sum(0)
    assert_gradient_agrees(together, total, backend, 16 * size)


@examples
@given(finite, st.floats(-4, 4))
def test_a_loss_of_part_of_a_batch_has_the_gradient_of_that_part(backend, rows, weight):
    """Rows share nothing: that of the mean over a repeated batch is that of the batch."""
    rows = rows.on(backend)
    alone = evaluate(rows, backend)
    thrice = Rows(*(torch.cat([t, t, t]) for t in rows))
    weights = {name: torch.full((6, 2), weight / 3, dtype=rows.logits.dtype) for name in alone[1]}
    found = evaluate(thrice, backend, weights).gradients
    size = 4 * sizes_of(alone.outputs)
    for name, gradient in found.items():
        added = gradient.view(3, *rows.logits.shape).sum(0)
        assert_gradient_agrees(added, weight * alone.gradients[name], backend, size, name)


@examples
@given(without_offsets, st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_temperature_divides_logits_and_gradient(backend, rows, temperature):
    rows = rows.on(backend)
    cooled = evaluate(rows.map(lambda x: x / temperature), backend)
    found = evaluate(rows, backend, temperature=temperature)
    expected = {name: g / temperature for name, g in cooled.gradients.items()}
    size = sizes_of(cooled.outputs) / temperature
    assert_gradients_agree(found.gradients, expected, backend, size)


@examples
@given(
    hostile(kinds=("random", "flat", "equal", "near", "both-out", "policy-out"), offsets=(0,)),
    st.sampled_from([3.0, 8.0, 30.0]),
    st.floats(0.3, 3),
)
def test_a_softcap_bends_logits_and_gradient(backend, rows, softcap, temperature):
    """The chain rule through softcap tanh(x / softcap), which leaves -inf where it is."""
    rows = rows.on(backend)
    outputs, found = evaluate(
        rows, backend, softcap=softcap, ref_softcap=softcap, temperature=temperature
    )
    bent = rows.map(lambda x: torch.where(x == NEG_INF, x, softcap * torch.tanh(x / softcap)))
    plain = evaluate(bent, backend, temperature=temperature)
    slope = 1 - torch.tanh(rows.logits.double() / softcap) ** 2
    expected = {name: g.double() * slope for name, g in plain.gradients.items()}
    assert_gradients_agree(found, expected, backend, 2 * sizes_of(outputs) / temperature)


@examples
@given(hostile(kinds=tuple(FINITE)))
def test_gradients_are_those_autograd_finds_for_the_definitions(backend, rows):
    x = rows.logits.detach().requires_grad_()
    log_p, log_q = x.log_softmax(-1), rows.ref_logits.log_softmax(-1)
    logprob = log_p.gather(-1, rows.token_ids[..., None])
    # 0 log 0 is 0: what is ruled out in both models adds nothing.
    log_p, log_q = (torch.where(rows.logits > NEG_INF, t, -1e3) for t in (log_p, log_q))
    p, q = log_p.exp(), log_q.exp()
    definitions = {
        "logprob": logprob,
        "kl": (p * (log_p - log_q)).sum(-1),
        "forward_kl": (q * (log_q - log_p)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
    }
    outputs, found = evaluate(rows.on(backend), backend, names=tuple(definitions))
    expected = {
        name: torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
        for name, value in definitions.items()
    }
    assert_gradients_agree(found, expected, backend, sizes_of(outputs))


@examples
@given(hostile(kinds=tuple(KINDS), sizes=(1, 2, 5, 31), offsets=(0,)))
def test_the_score_function_is_zero_on_average(backend, rows):
    """The gradients of all tokens' log-probabilities, each as often as the policy samples it."""
    logits = rows.on(backend).logits.flatten(0, 1)  # [4, V]
    v = logits.shape[-1]
    repeated = logits[:, None].repeat(1, v, 1).requires_grad_()  # [4, V tokens, V]
    every_token = torch.arange(v).expand(4, v)
    logprob = kl_kernels.token_stats(repeated, every_token, backend=backend).logprob
    (score,) = torch.autograd.grad(logprob.sum(), repeated)
    p = logits.double().softmax(-1)
    mean = (p[..., None] * score.double()).sum(1)
    assert_gradient_agrees(mean, torch.zeros_like(mean), backend, 1.0)
