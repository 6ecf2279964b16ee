"""Vocabularies in parts: their states merge into the whole's, their gradients are its slices."""

import pytest
import torch

from kl_kernels.algebra.parts import finish_parts, local_token_ids, merge_parts, pack
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.lab.validate.errors import gradient_error, value_error
from kl_kernels.lab.validate.truth import DIFFERENTIABLE, OUTPUTS, eager, gradients
from kl_kernels.schemas import NO_TOKEN, STATE_FIELDS, state_fields

BACKENDS = ("reference", "cpu", "triton")
V = 300
PARTS = ((0, 1), (1, 100), (100, 101), (101, 257), (257, V))


def fold_part(inputs, start, end, backend, has_ref=True):
    ids = local_token_ids(inputs.token_ids, start, end - start)
    ref_logits = inputs.ref_logits[..., start:end] if has_ref else None
    return torch.ops.kl_kernels.fold_part(
        inputs.logits[..., start:end], ref_logits, ids, inputs.mask, *scales(inputs), backend
    )


def scales(inputs):
    ref_temperature = inputs.ref_temperature or inputs.temperature
    return inputs.temperature, ref_temperature, inputs.softcap, inputs.ref_softcap


def whole_of(inputs, backend, has_ref=True):
    states = [fold_part(inputs, *part, backend, has_ref) for part in PARTS]
    return finish_parts(merge_parts(torch.stack(states)), inputs.mask, torch.float32)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_merge_into_the_truth(backend, difficulty):
    for dtype in (torch.float32, torch.bfloat16):
        inputs = Case(difficulty, V, dtype).inputs()
        true = eager(inputs, torch.float64)
        plain = eager(inputs, torch.float32)
        outputs = whole_of(inputs, backend).outputs._asdict()
        policy_only = whole_of(inputs, backend, has_ref=False).outputs._asdict()
        for got, names in ((outputs, OUTPUTS), (policy_only, ("logprob", "entropy"))):
            for name in names:
                error, eagers = (value_error(name, v[name], true[name]) for v in (got, plain))
                assert error <= max(2e-6, eagers), (name, dtype)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_parts_are_slices_of_the_whole_gradient(backend, difficulty):
    inputs = Case(difficulty, V, torch.float32).inputs()
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(inputs.token_ids.shape, generator=generator) for name in DIFFERENTIABLE
    }
    true = gradients(inputs, weights, torch.float64)
    plain = gradients(inputs, weights, torch.float32)
    whole = whole_of(inputs, backend)
    size = eager(inputs, torch.float64)["kl"].nan_to_num(1.0, 1.0).clamp_min(1.0)
    for name in DIFFERENTIABLE:
        upstream = [weights[n] if n == name else None for n in ("logprob", "kl", "forward_kl")]
        upstream.append(weights["entropy"] if name == "entropy" else None)
        pieces = []
        for start, end in PARTS:
            grad = torch.ops.kl_kernels.token_kl_backward(
                *upstream,
                inputs.logits[..., start:end],
                inputs.ref_logits[..., start:end],
                local_token_ids(inputs.token_ids, start, end - start),
                inputs.mask,
                whole.policy_state,
                whole.ref_state,
                whole.outputs.kl,
                whole.outputs.entropy,
                *scales(inputs),
                True,
                backend,
            )
            pieces.append(grad)
        terms = weights[name].abs() * size / inputs.temperature
        error, eagers = (
            gradient_error(grad, true[name], terms) for grad in (torch.cat(pieces, -1), plain[name])
        )
        assert error <= max(1e-5, eagers), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_ref", [True, False])
def test_the_fields_are_what_they_are_called(backend, has_ref):
    inputs = Case("random", 40, torch.float32).inputs()
    state = fold_part(inputs, 0, 40, backend, has_ref)
    assert len(state) == len(state_fields(has_ref))
    field = dict(zip(STATE_FIELDS, state.double()))
    tx = inputs.logits.double() * 1.4426950408889634 - field["anchor"][..., None]
    expected = {
        "sx": tx.exp2().sum(-1),
        "ex": (tx.exp2() * tx).sum(-1),
        "token_tx": tx.gather(-1, inputs.token_ids[..., None]).squeeze(-1),
    }
    if has_ref:
        ty = inputs.ref_logits.double() * 1.4426950408889634 - field["ref_anchor"][..., None]
        expected |= {
            "sy": ty.exp2().sum(-1),
            "rk": (tx.exp2() * (tx - ty)).sum(-1),
            "fk": (ty.exp2() * (ty - tx)).sum(-1),
            "token_ty": ty.gather(-1, inputs.token_ids[..., None]).squeeze(-1),
        }
    for name, value in expected.items():
        torch.testing.assert_close(field[name], value, rtol=3e-6, atol=3e-6, msg=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_a_part_that_is_ruled_out_and_nothing_where_masked(backend):
    logits = torch.full((1, 2, 9), -torch.inf)
    logits[0, 1] = torch.nan
    ids = torch.full((1, 2), NO_TOKEN)
    mask = torch.tensor([[True, False]])
    state = torch.ops.kl_kernels.fold_part(logits, logits, ids, mask, 1.0, 1.0, None, None, backend)
    field = dict(zip(STATE_FIELDS, state))
    assert field["anchor"][0, 0].isfinite()
    assert field["anchor"][0, 0] < -1e30
    assert not torch.stack([field[name] for name in ("sx", "sy", "ex", "rk", "fk")]).any()
    assert field["token_tx"][0, 0] == field["token_ty"][0, 0] == torch.inf
    assert not state[:, 0, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_id_that_nobody_means_is_still_refused(backend):
    logits = torch.zeros(1, 1, 5)
    with pytest.raises(ValueError, match="token_ids holds -100 at an unmasked position"):
        torch.ops.kl_kernels.fold_part(
            logits, None, torch.tensor([[-100]]), None, 1.0, 1.0, None, None, backend
        )


@pytest.mark.parametrize("has_ref", [True, False])
def test_a_part_is_packed_as_it_came(has_ref):
    n_fields = len(state_fields(has_ref))
    state = torch.arange(n_fields * 6, dtype=torch.float32).view(n_fields, 2, 3)
    packed = pack(merge_parts(torch.stack([state])), has_ref=has_ref, dtype=torch.float32)
    assert packed.dtype == torch.float32
    assert torch.equal(packed, state)


@pytest.mark.parametrize("has_ref", [True, False])
def test_several_states_merge_at_once_as_they_do_in_turn(has_ref):
    g = torch.Generator().manual_seed(0)
    logits = 9 * torch.randn(2, 2, 3, V, generator=g, dtype=torch.float64)
    logits[..., slice(*PARTS[1])] = -torch.inf
    ids = torch.randint(100, V, (2, 3), generator=g)
    states = [
        torch.ops.kl_kernels.fold_part(
            logits[0, ..., start:end],
            logits[1, ..., start:end] if has_ref else None,
            local_token_ids(ids, start, end - start),
            None,
            1.0,
            1.0,
            None,
            None,
            "reference",
        )
        for start, end in PARTS
    ]
    first, *others = states
    for state in others:
        two = merge_parts(torch.stack([first, state]))
        first = pack(two, has_ref=has_ref, dtype=torch.float64)
    at_once, in_turn = merge_parts(torch.stack(states)), merge_parts(first[None])
    torch.testing.assert_close(tuple(at_once.state), tuple(in_turn.state), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(at_once[1:], in_turn[1:], rtol=1e-12, atol=1e-12)
