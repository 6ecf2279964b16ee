"""`finish_parts`: states of a row's parts in one kernel, on every backend against the algebra."""

import pytest
import torch
from host.cuda_on_host import backend as cuda_on_host
from operators import arguments
from test_parts import PARTS, V, fold_part

from kl_kernels.algebra.parts import finish_parts, merge_parts
from kl_kernels.backends import dispatch
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case
from kl_kernels.schemas import STATE_FIELDS, TokenKLOutputs

BACKENDS = ("reference", "cpu", "triton", "cuda on host")
RANGES = torch.tensor([[start, end - start] for start, end in PARTS], dtype=torch.float32)
TOKEN_TX = STATE_FIELDS.index("token_tx")


def finished(states, backend, **options):
    kernels = cuda_on_host() if backend == "cuda on host" else dispatch.choose(backend, [states])
    return TokenKLOutputs(
        *kernels.finish_parts(arguments("finish_parts", states=states, **options))
    )


def truth(states, mask=None):
    """The algebra of the same states, finished as float32's are."""
    outputs, *saved = finish_parts(merge_parts(states), mask, torch.float32)
    return TokenKLOutputs(*outputs, *saved)


def states_of(inputs, has_ref):
    return torch.stack([fold_part(inputs, *part, "reference", has_ref) for part in PARTS])


def assert_equal(found, expected):
    for name, value in expected._asdict().items():
        got = getattr(found, name)
        if name.endswith("_state"):  # nobody reads the anchor of a sum that is NaN
            got, value = (x.where(~x[1].isnan(), torch.nan) for x in (got, value))
        torch.testing.assert_close(
            got,
            value,
            rtol=3e-7,
            atol=3e-7,
            equal_nan=True,
            msg=lambda text, name=name: name + text,
        )


@pytest.mark.parametrize("has_ref", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_hard_input_is_finished_as_by_the_algebra(backend, has_ref):
    for difficulty in DIFFICULTIES:
        inputs = Case(difficulty, V, torch.float32).inputs()
        states = states_of(inputs, has_ref)
        found = finished(states, backend, ranges=RANGES, mask=inputs.mask)
        assert_equal(found, truth(states, inputs.mask))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_may_come_in_any_order_and_one_may_hold_everything(backend):
    states = states_of(Case("random", V, torch.float32).inputs(), True)
    expected = finished(states, backend, ranges=RANGES)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_equal(finished(states[order], backend, ranges=RANGES[order]), expected)
    alone = states[4:].clone()
    alone[:, [TOKEN_TX, -1]] = 0.5
    assert_equal(finished(alone, backend, ranges=torch.tensor([[0.0, 43.0]])), truth(alone))


@pytest.mark.parametrize("wrong", [(0, 0, 1), (1, 0, 2), (2, 1, 2), (4, 0, 256), (3, 1, 157)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_that_do_not_tile_a_vocabulary_give_nothing_but_nan(backend, wrong):
    states = states_of(Case("random", V, torch.float32).inputs(), True)
    part, which, number = wrong
    ranges = RANGES.clone()
    ranges[part, which] = number
    found = finished(states, backend, ranges=ranges)
    assert all(output.isnan().all() for output in found)


@pytest.mark.parametrize("has_ref", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_not_exactly_one_part_holds_is_nan_and_others_are_not(backend, has_ref):
    inputs = Case("random", V, torch.float32).inputs()
    states = states_of(inputs, has_ref)
    expected = truth(states)
    states[:, TOKEN_TX, 0, 1] = torch.inf  # on none
    states[:2, TOKEN_TX, 1, 0] = 0.5  # on two or more
    states[:, :, 1, 1] = torch.nan
    mask = torch.tensor([[True, True], [True, False]])
    found = finished(states, backend, ranges=RANGES, mask=mask)
    for output, true in zip(found, expected):
        torch.testing.assert_close(output[..., 0, 0], true[..., 0, 0], rtol=3e-7, atol=3e-7)
        assert output[..., 0, 1].isnan().all()
        assert output[..., 1, 0].isnan().all()
        assert not output[..., 1, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_rows_than_a_program_has_are_each_for_itself(backend):
    g = torch.Generator().manual_seed(0)
    states = torch.rand(3, 9, 1, 300, generator=g) * 4 + 0.1
    states[1:, [TOKEN_TX, -1]] = torch.inf
    found = finished(states, backend)
    assert_equal(found, truth(states))
    alone = finished(states[..., 299:].contiguous(), backend)
    assert all(torch.equal(a, b[..., 299:]) for a, b in zip(alone, found))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_part_that_makes_a_divergence_infinite_does_however_unlikely_it_is(backend):
    g = torch.Generator().manual_seed(0)
    states = torch.rand(3, 9, 1, 4, generator=g) + 0.1
    states[1:, [TOKEN_TX, -1]] = torch.inf
    states[1, [STATE_FIELDS.index(field) for field in ("rk", "fk")]] = torch.inf
    states[1, [STATE_FIELDS.index(field) for field in ("anchor", "ref_anchor")]] = -3000.0
    found = finished(states, backend)
    assert_equal(found, truth(states))
    assert found.kl.isposinf().all()
    assert found.forward_kl.isposinf().all()
