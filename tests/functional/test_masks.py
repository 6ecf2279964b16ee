"""Accepted masks, in every function that takes one, and the position of the argument."""

import inspect

import numpy as np
import pytest
import torch
from test_numbers import (
    ADVANTAGES,
    BOTH,
    CALLS,
    HEADS,
    IDS,
    LOGITS,
    MASK,
    ONE,
    OTHER,
    call,
    outputs,
)
from torch.utils._python_dispatch import TorchDispatchMode

import kl_kernels
from kl_kernels import checks, monitor

MASKED = {
    **{name: "mask" for name in CALLS if "mask" in CALLS[name][0]},
    **dict.fromkeys(
        (
            "token_stats",
            "token_kl",
            "token_jsd",
            "linear_token_stats",
            "linear_token_kl",
            "linear_token_jsd",
            "topk_kl",
            "kl_penalty",
        ),
        "mask",
    ),
    "selective_log_softmax": "row_mask",
    "missing_eos_penalty": "ended",
}
DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
)
ADDITIVE = torch.where(MASK, 0.0, -torch.inf)
NO_MASKS = {
    "additive": (ADDITIVE, "-inf"),
    "additive of a finite floor": (torch.where(MASK, 0.0, torch.finfo().min), r"-3\.40"),
    "NaN": (torch.where(MASK, 1.0, torch.nan), "nan"),
    "all NaN": (torch.full(MASK.shape, torch.nan), "nan"),
    "weights": (torch.where(MASK, 0.5, 0.0), r"0\.5"),
    "infinite": (torch.where(MASK, torch.inf, 0.0), "inf"),
    "negative": (-MASK.long(), "-1"),
    "numbers of packed sequences": (torch.tensor([[1, 1, 2], [2, 2, 0]]), "2"),
    "token ids": (torch.tensor([[17, 0, 1], [1, 0, 0]]), "17"),
    "half precision": (ADDITIVE.half(), "-inf"),
}


def shaped(mask, name):
    return mask[:, 2] if MASKED[name] == "ended" else mask


def test_no_mask_is_left_out():
    for name in kl_kernels.__all__:
        if inspect.isfunction(found := getattr(kl_kernels, name)):
            assert (MASKED.get(name) in inspect.signature(found).parameters) == (name in MASKED)
            takes_one = {"mask", "row_mask", "ended"} & set(inspect.signature(found).parameters)
            assert takes_one == ({MASKED[name]} if name in MASKED else set()), name


@pytest.mark.parametrize("name", MASKED)
def test_a_mask_counts_whatever_its_dtype(name):
    masked = MASKED[name]
    expected = call(name, **{masked: shaped(MASK, name)})
    everything = call(name, **{masked: shaped(torch.ones_like(MASK), name)})
    assert not all(map(torch.equal, expected, everything)), "the mask must matter"
    for dtype in DTYPES:
        found = call(name, **{masked: shaped(MASK, name).to(dtype)})
        assert all(map(torch.equal, expected, found)), dtype


@pytest.mark.parametrize("kind", NO_MASKS)
@pytest.mark.parametrize("name", MASKED)
def test_what_is_no_mask_is_refused_by_name_and_value(name, kind):
    wrong, value = NO_MASKS[kind]
    if MASKED[name] == "ended":
        wrong = wrong[wrong.bool() & (wrong != 1)][:1].expand(2)
    with pytest.raises(ValueError, match=f"^{MASKED[name]} holds {value}.*; it must hold True and"):
        call(name, **{MASKED[name]: wrong})


@pytest.mark.parametrize("wrong", [[[1, 1, 1]] * 2, "all", 1, np.ones((2, 3), dtype=bool)])
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_must_be_a_tensor(name, wrong):
    with pytest.raises(TypeError, match=f"^{MASKED[name]} is a .*torch.Tensor"):
        call(name, **{MASKED[name]: wrong})


def test_the_error_says_what_to_pass_for_an_additive_mask():
    with pytest.raises(ValueError, match="pass mask == 0") as error:
        kl_kernels.masked_mean(ONE, ADDITIVE)
    assert "additive" in str(error.value)
    assert torch.equal(
        kl_kernels.masked_mean(ONE, ADDITIVE == 0), kl_kernels.masked_mean(ONE, MASK)
    )


IN_ORDER = {
    "token_stats": (LOGITS, IDS),
    "token_kl": (*BOTH.values(), IDS),
    "token_jsd": tuple(BOTH.values()),
    "linear_token_stats": (HEADS["hidden"], HEADS["weight"], IDS),
    "linear_token_kl": (*HEADS.values(), IDS),
    "linear_token_jsd": tuple(HEADS.values()),
    "topk_kl": (LOGITS, IDS[..., None], torch.full((2, 3, 1), -1.0)),
    "compute_gae": (ONE, OTHER),
    "importance_weights": (ONE, OTHER),
    "ppo_policy_loss": (ONE, OTHER, ADVANTAGES),
    "ppo_value_loss": (ONE, OTHER, ADVANTAGES),
    "fused_policy_loss": (LOGITS, IDS, OTHER, ADVANTAGES),
    "masked_mean": (ONE,),
    "masked_var": (ONE,),
    "masked_whiten": (ONE,),
}


@pytest.mark.parametrize("name", IN_ORDER)
def test_the_mask_follows_its_tensors_by_position_or_by_name(name):
    function, tensors = getattr(kl_kernels, name), IN_ORDER[name]
    by_name = outputs(function(*tensors, mask=MASK))
    assert all(map(torch.equal, by_name, outputs(function(*tensors, MASK))))


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        ("selective_log_softmax", (LOGITS, IDS), r"temperature is of shape \(2, 3\)"),
        ("kl_penalty", (ONE, OTHER), r"kl_penalty is of shape \(2, 3\) and dtype torch.bool"),
    ],
)
def test_a_mask_in_the_place_of_a_drop_ins_option_is_named(function, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        getattr(kl_kernels, function)(*arguments, MASK)
    assert "tensor([" not in str(error.value)


def test_what_watches_takes_the_same_masks():
    control = kl_kernels.FixedKLController(0.1)
    stop, watcher = kl_kernels.KLEarlyStop(0.1), kl_kernels.KLMonitor()
    for take in (
        lambda mask: control.update(ONE, 2, mask),
        lambda mask: stop.before_step(ONE, mask),
        lambda mask: watcher.observe(0, kl=ONE, mask=mask),
        lambda mask: monitor.summarize_drift(ONE, mask, IDS),
    ):
        take(MASK)
        take(MASK.float())
        for wrong, value in NO_MASKS.values():
            with pytest.raises(ValueError, match=f"^mask holds {value}"):
                take(wrong)


class Dispatched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


def test_a_bool_mask_costs_no_operation():
    with Dispatched() as dispatched:
        assert checks.check_mask("mask", MASK) is MASK
    assert dispatched.operators == []


def test_a_mask_is_not_looked_at_where_looking_costs():
    """On another device, under a transform, and while torch.compile traces."""
    assert checks.check_mask("mask", ADDITIVE.to("meta")).dtype == torch.bool

    def total(x, mask):
        return kl_kernels.masked_mean(x, mask, dim=0)

    expected = total(ONE[0], MASK[0])
    assert torch.equal(torch.func.vmap(total)(ONE, MASK.float())[0], expected)
    compiled = torch.compile(total, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ONE[0], MASK[0].float()), expected)
