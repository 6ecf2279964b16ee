"""Features of the CPU backend alone: instruction sets, threads, dtype pairs and its error texts.

`test_fused_ops.py` checks its results. Vocabularies here are one block of 2048 and
a half, so that whole blocks, vectors and tails are all taken.
"""

import ctypes
import itertools

import pytest
import torch
from operators import arguments
from test_far_gradients import KINDS as KINDS_OF_FAR_LOGITS
from test_far_gradients import assert_true, rows_in

import kl_kernels
from kl_kernels.algebra.row import LN2
from kl_kernels.backends import compiled as native
from kl_kernels.lab.validate.cases import Case
from kl_kernels.lab.validate.report.grid import Cell
from kl_kernels.lab.validate.report.rows import make_rows as rows_of_a_kl
from kl_kernels.lab.validate.truth import DIFFERENTIABLE, gradients
from kl_kernels.schemas import (
    OPERATORS,
    TokenKLArgs,
    TokenKLOutputs,
    TokenStatsBackwardArgs,
    pick,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEG_INF = float("-inf")
V = 3071


@pytest.fixture(scope="module")
def instruction_set():
    """Selects an instruction set by name; returns the one in use, None where the CPU lacks it."""
    select = ctypes.CDLL(str(native.library_path("cpu"))).kl_kernels_instruction_set
    select.restype, select.argtypes = ctypes.c_char_p, [ctypes.c_char_p]

    def use(name):
        chosen = select(None if name is None else name.encode())
        return chosen and chosen.decode()

    yield use
    select(b"best")


def make_rows(dtype, ref_dtype=None, vocab_size=V, seed=0, shape=(2, 3)):
    """Random rows, two of which leave the fast loop: -inf in both models, and a late peak."""
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(*shape, vocab_size, generator=g)
    ref_logits = logits + torch.randn(*shape, vocab_size, generator=g)
    logits[0, 1, 5:900], ref_logits[0, 1, 5:900] = NEG_INF, NEG_INF
    logits[1, 0, -1] += 40
    token_ids = torch.randint(5, (shape[0], shape[1]), generator=g)
    return logits.to(dtype), ref_logits.to(ref_dtype or dtype), token_ids


def values_and_gradient(logits, ref_logits, token_ids, backend="cpu", **options):
    logits = logits.detach().requires_grad_()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend, **options)
    jsd = kl_kernels.token_jsd(logits, ref_logits, beta=0.3, backend=backend, **options)
    loss = (result.logprob + 2 * result.kl - result.forward_kl + result.entropy + jsd).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    return torch.stack([t.detach() for t in (*result, jsd)]), grad


def relative_to_row(grad, expected):
    error = torch.linalg.vector_norm(grad.double() - expected.double(), dim=-1)
    return (error / torch.linalg.vector_norm(expected.double(), dim=-1)).max().item()


def test_the_best_instruction_set_is_in_use(instruction_set):
    available = [n for n in ("x86-64-v4", "x86-64-v3", "base") if instruction_set(n)]
    assert available[-1] == "base"
    assert instruction_set("best") == available[0]
    assert instruction_set("no such thing") is None
    assert instruction_set(None) == available[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spread", [0.3, 3.0, 30.0])  # the last: pairs that are not near each other
@pytest.mark.parametrize("inf_fraction", [0.0, 0.5])
def test_a_small_kl_keeps_its_digits(instruction_set, dtype, spread, inf_fraction):
    """Two sums that are rounded apart would leave an error of 10 %."""
    for vocab_size in (33, V):
        cell = Cell("", dtype, vocab_size, 1e-6, spread, 0.7, 0.0, inf_fraction, 8)
        inputs = rows_of_a_kl(cell)
        rows = inputs.logits, inputs.ref_logits, inputs.token_ids
        true = kl_kernels.token_kl(*rows, temperature=0.7, backend="reference")
        for name in ("x86-64-v4", "x86-64-v3", "base"):
            instruction_set(name)
            found = kl_kernels.token_kl(*rows, temperature=0.7, backend="cpu")
            for got, expected in ((found.kl, true.kl), (found.forward_kl, true.forward_kl)):
                assert (abs(got - expected) <= 2e-3 * expected + 1e-10).all()


@pytest.mark.parametrize("name", ["x86-64-v3", "base"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_instruction_sets_agree(instruction_set, name, dtype):
    """Each has its own exponential, conversions and number of lanes."""
    rows = make_rows(dtype)
    options = {"temperature": 0.9, "softcap": 20.0} if dtype == torch.float16 else {}
    best, best_grad = values_and_gradient(*rows, **options)
    if instruction_set(name) is None:
        assert instruction_set("base") == "base"  # an architecture with one instruction set
    values, grad = values_and_gradient(*rows, **options)
    instruction_set("best")
    torch.testing.assert_close(values, best, rtol=2e-6, atol=2e-6)
    # On either side of a rounding boundary, each of the two gradients differs by one unit in the
    # last place.
    units = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(grad.float(), best_grad.float(), rtol=max(units, 1e-5), atol=1e-7)


@pytest.mark.parametrize("name", ["x86-64-v3", "base"])
@pytest.mark.parametrize("kind", KINDS_OF_FAR_LOGITS)
def test_far_logits_have_true_gradients_on_every_instruction_set(instruction_set, name, kind):
    instruction_set(name)
    for distance in (1.1e7, 1.2e9):
        assert_true(*rows_in(torch.float32, kind, distance, 1.0, 33, seed=0), 1.0)
    instruction_set("best")


@pytest.mark.parametrize(("dtype", "ref_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_every_pair_of_dtypes(dtype, ref_dtype):
    """The gradient is the float64 one rounded once; it has the policy's dtype."""
    rows = make_rows(dtype, ref_dtype)
    values, grad = values_and_gradient(*rows)
    expected, expected_grad = values_and_gradient(
        rows[0].double(), rows[1].double(), rows[2], "reference"
    )
    assert grad.dtype == dtype
    torch.testing.assert_close(values.double(), expected, rtol=2e-6, atol=2e-6)
    assert relative_to_row(grad, expected_grad) <= 1e-5 + torch.finfo(dtype).eps / 2


def test_saved_states_belong_to_their_anchors():
    """(anchor, sum) must give the log-sum-exp in float64, and 0 for masked rows."""
    logits, ref_logits, token_ids = make_rows(torch.bfloat16, torch.float32)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    args = TokenKLArgs(logits, ref_logits, token_ids, mask, 0.7, 1.3, None, None)
    *_, policy_state, ref_state = native.namespace("cpu").token_kl(args)
    for state, values in ((policy_state, logits.double() / 0.7), (ref_state, ref_logits / 1.3)):
        anchor, total = state.double()
        lse = torch.log(total) + anchor * LN2
        torch.testing.assert_close(
            lse[mask], values.double().logsumexp(-1)[mask], rtol=1e-6, atol=1e-6
        )
        assert state[:, ~mask].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    rows = make_rows(dtype, shape=(4, 9))
    found = {}
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found[threads] = values_and_gradient(*rows)
    torch.set_num_threads(before)
    for threads in (2, 3):
        for one, other in zip(found[1], found[threads]):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_batch_or_layout(dtype):
    logits, ref_logits, token_ids = make_rows(dtype, shape=(3, 4))
    values, grad = values_and_gradient(logits, ref_logits, token_ids)
    wide = torch.full((3, 9, V + 13), 5.0, dtype=dtype)
    wide[:, ::2][:, :4, 7 : 7 + V] = logits
    strided = wide[:, ::2][:, :4, 7 : 7 + V]
    as_view, as_view_grad = values_and_gradient(strided, ref_logits, token_ids)
    assert torch.equal(as_view, values)
    assert torch.equal(as_view_grad, grad)
    for b, t in itertools.product(range(3), range(4)):
        one = (slice(b, b + 1), slice(t, t + 1))
        alone, alone_grad = values_and_gradient(strided[one], ref_logits[one], token_ids[one])
        assert torch.equal(alone[:, 0, 0], values[:, b, t])
        assert torch.equal(alone_grad[0, 0], grad[b, t])


def test_rows_of_an_expanded_tensor_are_read_in_place():
    logits, ref_logits, token_ids = make_rows(torch.float32)
    values, _ = values_and_gradient(logits[:1, :1].expand(2, 3, V), ref_logits, token_ids)
    copied, _ = values_and_gradient(logits[:1, :1].repeat(2, 3, 1), ref_logits, token_ids)
    assert torch.equal(values, copied)


def test_a_masked_row_is_neither_read_nor_left_unwritten():
    logits, ref_logits, token_ids = make_rows(torch.bfloat16)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    values, grad = values_and_gradient(logits, ref_logits, token_ids, mask=mask)
    logits, ref_logits = (t.masked_fill(~mask[..., None], torch.nan) for t in (logits, ref_logits))
    token_ids = token_ids.masked_fill(~mask, -(2**62))
    again, grad_again = values_and_gradient(logits, ref_logits, token_ids, mask=mask)
    assert torch.equal(values, again)
    assert torch.equal(grad, grad_again)
    assert values[:, ~mask].eq(0).all()
    assert grad[~mask].eq(0).all()


@pytest.mark.parametrize("bad", [-1, V, 2**40])
@pytest.mark.parametrize("name", ["token_stats", "token_kl"])
def test_a_token_outside_the_vocabulary_is_named(name, bad):
    """The same words as the reference backend's; a masked position may hold anything."""
    logits, ref_logits, token_ids = make_rows(torch.float32)
    token_ids[1, 2] = bad
    models = (logits, ref_logits) if name == "token_kl" else (logits,)
    message = f"token_ids holds {bad} at an unmasked position; accepted: 0 to {V - 1}"
    for backend in ("cpu", "reference"):
        with pytest.raises(ValueError, match=message):
            getattr(kl_kernels, name)(*models, token_ids, backend=backend)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 2] = False
    getattr(kl_kernels, name)(*models, token_ids, mask=mask, backend="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_reference_nobody_needs_is_not_read(dtype):
    """Without a gradient of either KL in a row, its reference may by then hold anything."""
    logits, ref_logits, token_ids = make_rows(dtype)
    kernels = native.namespace("cpu")
    args = arguments("token_kl", logits=logits, ref_logits=ref_logits, token_ids=token_ids)
    out = TokenKLOutputs(*kernels.token_kl(args))
    ones, zeros = torch.ones(2, 3), torch.zeros(2, 3)
    grad, expected = torch.empty_like(logits), torch.empty_like(logits)
    backward = arguments(
        "token_kl_backward",
        grad_logprob=ones,
        grad_kl=zeros,
        grad_entropy=ones,
        logits=logits,
        ref_logits=torch.full_like(ref_logits, torch.nan),
        token_ids=token_ids,
        policy_state=out.policy_state,
        ref_state=out.ref_state,
        kl=out.kl,
        entropy=out.entropy,
        grad_logits=grad,
    )
    kernels.token_kl_backward(backward)
    kernels.token_stats_backward(
        pick(TokenStatsBackwardArgs, backward)._replace(grad_logits=expected)
    )
    assert grad.isfinite().all()
    assert torch.equal(grad, expected)


def test_a_dtype_it_cannot_take_is_refused():
    logits = torch.zeros(1, 1, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="logits has a dtype compiled backends do not take"):
        native.namespace("cpu").token_stats(
            arguments("token_stats", logits=logits, token_ids=torch.zeros(1, 1, dtype=torch.long))
        )


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_is_there(operator):
    assert callable(getattr(native.namespace("cpu"), operator))


def test_a_library_that_is_not_there_says_so():
    reason = native.unavailable_reason("no_such_device")
    assert reason is not None
    assert "not built" in reason
    with pytest.raises(RuntimeError, match="no_such_device backend is not built"):
        native.namespace("no_such_device")


@pytest.mark.parametrize(
    "difficulty",
    ["random", "wide", "peaked", "unlikely-token", "offset", "temperature", "both-inf"],
)
def test_the_gradient_of_kl_is_within_1e_5_of_its_own_norm(difficulty):
    """One token may have all the probability, where eager's own gradient is noise."""
    inputs = Case(difficulty, 1025, torch.float32).inputs()
    ones = {name: torch.ones(2, 2) for name in DIFFERENTIABLE}
    true = gradients(inputs, ones, torch.float64)["kl"]
    logits = inputs.logits.clone().requires_grad_()
    result = kl_kernels.token_kl(**(vars(inputs) | {"logits": logits}), backend="cpu")
    (grad,) = torch.autograd.grad(result.kl.sum(), logits)
    assert ((grad.double() - true).norm(dim=-1) <= 1e-5 * true.norm(dim=-1)).all()
