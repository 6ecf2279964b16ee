"""Each check by itself: what it takes, what it refuses, and the words in between."""

import math
import types

import numpy as np
import pytest
import torch

from kl_kernels import checks

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.ones(2, 3, dtype=torch.bool)


class OnAMesh(torch.Tensor):
    """Stand-in for a DTensor, which needs processes: told apart alike."""

    device_mesh = None


class Tagged(torch.Tensor):
    pass


MESHED = torch.zeros(2, 3).as_subclass(OnAMesh)


@pytest.mark.parametrize("value", [2.5, 3, np.float32(0.5), torch.tensor(7), np.array(2.0)])
def test_a_number_becomes_a_float_of_its_value(value):
    number = checks.check_number("kl_coef", value)
    assert type(number) is float
    assert number == float(value)


@pytest.mark.parametrize("value", [2.5, 3])
def test_a_python_number_is_not_looked_into(value, monkeypatch):
    """torch.compile would trace what looks."""
    monkeypatch.setattr(checks, "unboxed", None)
    assert checks.check_number("kl_coef", value) == value


@pytest.mark.parametrize("value", [True, "1", None, [1.0], torch.ones(2), np.ones(1), 1j])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"^kl_coef is .*; it must be a number$"):
        checks.check_number("kl_coef", value)


def test_only_what_was_measured_may_require_grad():
    measured = torch.tensor(0.5, requires_grad=True)
    assert checks.check_measured("kl", measured) == 0.5
    with pytest.raises(ValueError, match=r"^kl_coef requires grad.* pass kl_coef.detach\(\)$"):
        checks.check_number("kl_coef", measured)


@pytest.mark.parametrize("number", [-math.inf, math.inf, math.nan])
def test_what_is_not_finite_is_refused(number):
    for check in (checks.check_finite, checks.check_positive, checks.check_non_negative):
        with pytest.raises(ValueError, match=f"^lam is {number}; it must be a finite number"):
            check("lam", number)


def test_an_integer_may_be_the_least_accepted():
    assert checks.check_integer("window", torch.tensor(4), at_least=4) == 4
    with pytest.raises(ValueError, match=r"^window is 3; it must be an integer, 4 or above$"):
        checks.check_integer("window", 3, at_least=4)
    with pytest.raises(ValueError, match=r"^window is on meta"):
        checks.check_integer("window", torch.tensor(4, device="meta"))
    for value in (True, 2.5, "3", torch.tensor(2.0), np.ones(1, dtype=int)):
        with pytest.raises(TypeError, match=r"^window is .*; it must be an integer$"):
            checks.check_integer("window", value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (torch.zeros(2, 3), "of shape (2, 3) and dtype torch.float32"),
        (np.zeros((4, 5)), "of shape (4, 5) and dtype float64"),
        (types.SimpleNamespace(dtype="int8"), "of shape () and dtype int8"),
        ([1, 2], "[1, 2]"),
        ("k1", "'k1'"),
    ],
)
def test_a_value_is_shown_and_a_tensor_only_described(value, shown):
    with pytest.raises(ValueError, match=r"; accepted: 'a', 'b'$") as error:
        checks.check_choice("kind", value, ("a", "b"))
    assert str(error.value).startswith(f"kind is {shown};")


def test_a_dtensor_is_told_from_other_tensors():
    assert checks.is_dtensor(MESHED)
    assert not checks.is_dtensor(torch.zeros(2))
    assert not checks.is_dtensor(torch.zeros(2).as_subclass(Tagged))
    assert not checks.is_dtensor(types.SimpleNamespace(device_mesh=None))
    plain = torch.zeros(2)
    plain.device_mesh = None
    assert not checks.is_dtensor(plain)


def test_a_dtensor_and_a_plain_tensor_do_not_mix():
    checks.check_same_kind("mask", MESHED, "logits", MESHED)
    checks.check_same_kind("mask", MASK, "logits", IDS)
    for pair in ((MESHED, MASK), (MASK, MESHED)):
        with pytest.raises(TypeError, match=r"^mask is a .*both must be DTensors, or both plain"):
            checks.check_same_kind("mask", pair[0], "logits", pair[1])


def test_sequences_of_this_process_are_no_dtensor():
    checks.check_plain("scores", IDS)
    with pytest.raises(TypeError, match=r"^scores is a OnAMesh; .* pass its to_local\(\)$"):
        checks.check_plain("scores", MESHED)


def test_values_of_a_dtensor_are_not_looked_at():
    assert checks.values_are_at_hand(torch.zeros(2))
    assert not checks.values_are_at_hand(MESHED)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32, torch.uint8])
def test_a_mask_of_ones_and_zeros_is_taken_in_any_dtype(dtype):
    mask = torch.tensor([[1, 0, 1]]).to(dtype)
    assert torch.equal(checks.check_mask("mask", mask), mask.bool())


@pytest.mark.parametrize("wrong", [2, -1, 0.5, math.nan, -math.inf])
def test_a_mask_of_anything_else_names_what_it_holds(wrong):
    with pytest.raises(ValueError, match=rf"^mask holds {wrong}; .*pass mask == 0\)$"):
        checks.check_mask("mask", torch.tensor([1, 0, wrong]))


def test_a_mask_that_nobody_can_look_at_is_taken():
    assert checks.check_mask("mask", torch.full((2,), 7.0, device="meta")).dtype == torch.bool


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "state is of no class;"),
        ({"class": "KLMonitor"}, "state is of KLMonitor;"),
        ([1, 2], r"state is of \[1, 2\];"),
        (torch.zeros(3), r"state is of of shape \(3,\) and dtype torch.float32;"),
        ({"class": "KLEarlyStop", "kl": 1}, "state of KLEarlyStop has no 'steps'"),
    ],
)
def test_a_state_of_something_else_is_refused(state, message):
    checks.check_state(
        {"class": "KLEarlyStop", "kl": 1, "steps": 2}, "KLEarlyStop", ["kl", "steps"]
    )
    with pytest.raises(ValueError, match="^" + message):
        checks.check_state(state, "KLEarlyStop", ["kl", "steps"])


@pytest.mark.parametrize("logprobs", [[-1.0, 0.0], [0.0, 0.0], [0.01], [-1.0, 5.0], []])
def test_log_probabilities_are_taken(logprobs):
    """Also those that rounding has lifted above 0, and any where one of them is below it."""
    logprobs = torch.tensor(logprobs, dtype=torch.float64)
    checks.check_logprobs("logprobs", logprobs, torch.ones_like(logprobs, dtype=torch.bool))


@pytest.mark.parametrize("probabilities", [[0.5, 0.25], [0.0, 0.9], [0.3]])
def test_probabilities_are_refused(probabilities):
    probabilities = torch.tensor(probabilities)
    mask = torch.ones_like(probabilities, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"^logprobs holds {probabilities.max().item():.3g}, and"):
        checks.check_logprobs("logprobs", probabilities, mask)
    checks.check_logprobs("logprobs", probabilities, ~mask)


@pytest.mark.parametrize(
    ("shape", "batch", "packed"),
    [
        ((2,), (1, 6), True),
        ((3,), (1, 6), True),
        ((1,), (2, 6), False),
        ((3,), (2, 6), False),
        ((2, 1), (1, 6), False),
        ((), (1, 6), False),
        ((0,), (1, 6), False),
    ],
)
def test_one_per_sequence_of_a_packed_row_is_answered_with_cu_seqlens(shape, batch, packed):
    checks.check_per_sequence("scores", torch.zeros(batch[0]), "mask", torch.zeros(batch))
    with pytest.raises(ValueError, match=rf"^scores has shape .* needs \({batch[0]},\)") as error:
        checks.check_per_sequence("scores", torch.zeros(shape), "mask", torch.zeros(batch))
    assert ("pass cu_seqlens" in str(error.value)) == packed


def test_a_tangent_is_refused_in_words_to_act_on():
    message = str(checks.no_forward_mode("logits"))
    assert message.startswith("logits carries a tangent")
    assert message.endswith("derivatives (torch.func.jvp, jacfwd, hessian); use backward")


def test_the_slice_is_named_only_where_shapes_differ_by_one_row():
    def advice(shape, rows):
        return checks.shift_advice("ids", torch.Size(shape), "logits", torch.Size(rows))

    assert advice((2, 3), (2, 4)).endswith("pass logits[:, :-1]")
    assert advice((2, 4), (2, 3)).endswith("pass ids[:, 1:]")
    assert advice((3,), (4,)).endswith("pass logits[:-1]")
    for shape, rows in (((), ()), ((), (1,)), ((3,), (3, 4)), ((2, 3), (3, 4)), ((2, 3), (2, 5))):
        assert advice(shape, rows) == ""


CHAINS = [
    (("kl_kernels.a",), 2),
    (("kl_kernels.a", "kl_kernels.b"), 3),
    (("torch._dynamo", "kl_kernels"), 3),
    (("torch", None, "kl_kernels"), 4),
    (("trainer", "kl_kernels.a"), 2),
    (("kl_kernels.a", "trainer", "kl_kernels.b"), 2),
    (("torchtune.step", "torch.autograd"), 2),
    (("kl_kernels_addon", "kl_kernels.rl"), 2),
]


@pytest.mark.parametrize(("modules", "level"), CHAINS)
def test_the_level_is_that_of_the_nearest_module_outside(modules, level):
    frame = types.SimpleNamespace(f_back=None, f_globals={"__name__": "__main__"})
    for name in modules:
        scope = {} if name is None else {"__name__": name}
        frame = types.SimpleNamespace(f_back=frame, f_globals=scope)
    assert checks._level_outside(frame) == level


def test_the_level_ends_where_the_stack_does():
    frame = types.SimpleNamespace(f_back=None, f_globals={"__name__": "torch"})
    assert checks._level_outside(frame) == 1


@pytest.mark.parametrize(("modules", "level"), CHAINS)
def test_frames_of_a_warning_are_counted_from_where_it_is_given(modules, level):
    """`callers_level` is asked by a function of this package, called by the chain's last."""
    scope = {"__name__": "kl_kernels.asking", "checks": checks}
    exec("def asks(): return checks.callers_level()", scope)
    function = scope["asks"]
    for name in reversed(modules):
        scope = {"inner": function} | ({} if name is None else {"__name__": name})
        exec("def call(): return inner()", scope)
        function = scope["call"]
    assert function() == level + 1
