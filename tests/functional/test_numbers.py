"""Every number of every public function and class: Python's, numpy's, or of a 0-dim tensor."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest
import torch

import kl_kernels
from kl_kernels import monitor
from kl_kernels.lab.ppo.config import PPOConfig

V, K, D = 7, 2, 4
g = torch.Generator().manual_seed(0)
LOGITS, REF_LOGITS = torch.randn(2, 2, 3, V, generator=g)
IDS = torch.randint(V, (2, 3), generator=g)
MASK = torch.tensor([[True, True, True], [True, False, False]])
HEADS = {
    "hidden": torch.randn(2, 3, D, generator=g),
    "weight": torch.randn(V, D, generator=g),
    "ref_hidden": torch.randn(2, 3, D, generator=g),
    "ref_weight": torch.randn(V, D, generator=g),
}
ONE, OTHER = -torch.rand(2, 2, 3, generator=g)
OLD = torch.tensor([[-9.0, 0.0, -9.0], [-9.0, 0.0, 0.0]])  # each clip decides somewhere
ADVANTAGES = torch.tensor([[1.0, -1.0, -2.0], [2.0, 0.0, 0.0]])
SCORES = torch.tensor([2.0, -1.0])
ONE_HEAD = {name: HEADS[name] for name in ("hidden", "weight")}
BOTH = {"logits": LOGITS, "ref_logits": REF_LOGITS}

SCALE = {"temperature": 0.5, "softcap": 4.0}
SCALES = {**SCALE, "ref_temperature": 2.0, "ref_softcap": 8.0}
HEAD_SCALE = {**SCALE, "logit_scale": 0.25, "memory_budget": 1 << 20}
HEAD_SCALES = {**SCALES, **HEAD_SCALE, "ref_logit_scale": 0.5}
CLIPS = {"clip_low": 0.03125, "clip_high": 0.0625, "dual_clip": 1.25, "log_ratio_clamp": 0.5}

# Each function's other arguments, and its numbers.
CALLS = {
    "token_stats": ({"logits": LOGITS, "token_ids": IDS}, SCALE),
    "token_kl": ({**BOTH, "token_ids": IDS}, SCALES),
    "token_jsd": (BOTH, {**SCALES, "beta": 0.25}),
    "kl_rewards": (
        {**BOTH, "token_ids": IDS, "scores": SCORES, "mask": MASK},
        {**SCALES, "kl_coef": 0.125, "score_clip": 1.5, "kl_clip": 0.25},
    ),
    "fused_policy_loss": (
        {**BOTH, "token_ids": IDS, "old_logprobs": OLD, "advantages": ADVANTAGES, "mask": MASK},
        {
            **SCALES,
            **CLIPS,
            "kl_loss_coef": 0.5,
            "entropy_coef": 0.25,
            "denominator": 8,
            "loss_scale": 4.0,
        },
    ),
    "linear_policy_loss": (
        {**HEADS, "token_ids": IDS, "old_logprobs": OLD, "advantages": ADVANTAGES, "mask": MASK},
        {
            **HEAD_SCALES,
            **CLIPS,
            "kl_loss_coef": 0.5,
            "entropy_coef": 0.25,
            "denominator": 8,
            "loss_scale": 4.0,
        },
    ),
    "linear_token_stats": ({**ONE_HEAD, "token_ids": IDS}, HEAD_SCALE),
    "linear_token_kl": ({**HEADS, "token_ids": IDS}, HEAD_SCALES),
    "linear_token_jsd": (HEADS, {**HEAD_SCALES, "beta": 0.25}),
    "selective_log_softmax": ({"logits": LOGITS, "index": IDS[..., None]}, {"temperature": 0.5}),
    "topk_kl": (
        {
            "logits": LOGITS,
            "topk_ids": IDS[..., None],
            "topk_logprobs": torch.full((2, 3, 1), -1.0),
        },
        {**SCALE, "beta": 0.25},
    ),
    "compute_gae": ({"rewards": ONE, "values": OTHER, "mask": MASK}, {"gamma": 0.75, "lam": 0.5}),
    "compute_rewards": (
        {"scores": SCORES, "kl": ONE, "mask": MASK},
        {"kl_coef": 0.125, "score_clip": 1.5, "kl_clip": 0.25},
    ),
    "group_advantages": ({"scores": SCORES}, {"group_size": 2, "eps": 0.125}),
    "importance_weights": (
        {"logprobs": ONE, "rollout_logprobs": OTHER, "mask": MASK},
        {"low": 0.5, "high": 1.0},
    ),
    "kl_penalty": (
        {"logprobs": ONE, "ref_logprobs": OTHER, "kl_penalty": "k3"},
        {"log_ratio_clamp": 0.5, "kl_clamp": 0.125},
    ),
    "ppo_policy_loss": (
        {"logprobs": ONE, "old_logprobs": OLD, "advantages": ADVANTAGES, "mask": MASK},
        {**CLIPS, "denominator": 8},
    ),
    "ppo_value_loss": (
        {"values": ONE, "old_values": OTHER, "returns": ADVANTAGES, "mask": MASK},
        {"clip_range": 0.0625, "denominator": 8},
    ),
    "aggregate": ({"loss_per_token": ONE, "mask": MASK}, {"denominator": 8}),
    "global_denominator": ({"mask": MASK}, {}),
    "sampling_gap": ({"logprob": OLD, "entropy": -OTHER, "mask": MASK}, {}),
    "masked_mean": ({"x": ONE, "mask": MASK}, {"dim": 1}),
    "masked_var": ({"x": ONE, "mask": MASK}, {}),
    "masked_whiten": ({"x": ONE, "mask": MASK}, {"eps": 0.125}),
    "missing_eos_penalty": ({"scores": SCORES, "ended": MASK[:, 2]}, {"penalty": 0.5}),
    "overlong_penalty": (
        {"lengths": torch.tensor([300, 480])},
        {"max_length": 512, "buffer": 64, "factor": 0.5},
    ),
    "length_normalized_scores": ({"scores": SCORES, "mask": MASK}, {"exponent": 0.5}),
}
ELSEWHERE = {"vocab_start"}  # with a group: tests/partitioned/test_parallel.py
INTEGERS = {"dim", "group_size"}
OTHER_INTEGERS = {"dim": 0, "group_size": 1}
IN_CALLS = [(function, name) for function, (_, numbers) in CALLS.items() for name in numbers]

KINDS = {
    "int": lambda x: int(x) if x == int(x) else x,
    "np.float64": np.float64,
    "np.float32": np.float32,
    "np.int64": lambda x: np.int64(x) if x == int(x) else np.float16(x),
    "0-dim array": lambda x: np.array(x),
    "0-dim float32": lambda x: torch.tensor(x, dtype=torch.float32),
    "0-dim float64": lambda x: torch.tensor(x, dtype=torch.float64),
    "0-dim integer": lambda x: torch.tensor(int(x) if x == int(x) else x),
}
NO_NUMBERS = (
    "1", b"1", [1.0], (1.0,), {}, object(), 1j, True, np.True_, torch.tensor(True),
    torch.tensor(1j), np.ones(1), np.ones((2, 3)), np.str_("1"),
)  # fmt: skip


def outputs(result):
    parts = result if isinstance(result, tuple) else (result,)
    return [t for part in parts for t in (part.values() if isinstance(part, dict) else (part,))]


def call(function, **changed):
    others, numbers = CALLS[function]
    return outputs(getattr(kl_kernels, function)(**{**others, **numbers, **changed}))


def test_no_number_is_left_out():
    for function in kl_kernels.__all__:
        if inspect.isfunction(found := getattr(kl_kernels, function)):
            annotated = inspect.signature(found).parameters.values()
            numbers = {p.name for p in annotated if re.search(r"\b(float|int)\b", p.annotation)}
            assert numbers - ELSEWHERE == set(CALLS[function][1]), function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("function", "name"), IN_CALLS)
def test_a_number_counts_whatever_its_type(function, name, kind):
    number = CALLS[function][1][name]
    if name in INTEGERS and "float" in kind:
        return  # refused: test_an_integer_must_be_whole
    expected, found = call(function), call(function, **{name: KINDS[kind](number)})
    for e, f in zip(expected, found, strict=True):
        assert torch.equal(e, f)
        assert e.dtype == f.dtype


@pytest.mark.parametrize(("function", "name"), IN_CALLS)
def test_each_number_reaches_its_function(function, name):
    """Otherwise the test above would compare what depends on nothing."""
    other = OTHER_INTEGERS.get(name, CALLS[function][1][name] * 0.875)
    pairs = zip(call(function), call(function, **{name: other}), strict=True)
    is_changed = any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
    if name != "loss_scale":  # it changes the rounding alone, if anything
        assert is_changed == (name != "memory_budget")


@pytest.mark.parametrize(("function", "name"), IN_CALLS)
def test_what_is_no_number_is_refused_by_name(function, name):
    for wrong in NO_NUMBERS:
        if name == "dim" and isinstance(wrong, (tuple, list)):
            continue  # accepted: several dimensions
        if name == "denominator" and isinstance(wrong, torch.Tensor):
            continue  # a tensor stays one: tests/rl/test_rl_losses.py
        with pytest.raises((TypeError, ValueError), match=rf"^{name} (is|has) ") as error:
            call(function, **{name: wrong})
        assert len(str(error.value)) < 200


def test_a_number_that_would_need_a_gradient_is_refused():
    temperature = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=r"temperature requires grad.*temperature.detach\(\)"):
        call("token_stats", temperature=temperature)
    with torch.no_grad():
        assert torch.equal(call("token_stats", temperature=temperature)[0], call("token_stats")[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.tensor(1.0, device="meta"), "temperature is on meta"),
        (10**400, "temperature is larger than any float"),
        (np.float32("nan"), "temperature is nan"),
        (torch.tensor(-1.0), "temperature is -1.0"),
        (np.array(0), "temperature is 0; it must be a finite number above 0"),
    ],
)
def test_a_number_outside_its_range_is_named_with_its_value(wrong, message):
    with pytest.raises(ValueError, match=message):
        call("token_stats", temperature=wrong)


@pytest.mark.parametrize(
    "wrong", [1.0, 1.5, np.float64(1), torch.tensor(1.0), "1", True, None, [1]]
)
def test_an_integer_must_be_whole(wrong):
    with pytest.raises(TypeError, match=r"^top is .*an integer"):
        monitor.summarize_drift(ONE, MASK, IDS, top=wrong)


@pytest.mark.parametrize("top", [2, np.int32(2), np.uint8(2), np.array(2), torch.tensor(2)])
def test_an_integer_may_be_of_any_type(top):
    expected = monitor.summarize_drift(ONE, MASK, IDS, top=2)
    assert monitor.summarize_drift(ONE, MASK, IDS, top=top) == expected


@pytest.mark.parametrize("dim", [1, np.int64(1), torch.tensor(1), (1,), [np.int64(-1)]])
def test_a_dimension_may_be_of_any_type(dim):
    expected = torch.stack([ONE[0].mean(), ONE[1, 0]])
    torch.testing.assert_close(kl_kernels.masked_mean(ONE, MASK, dim), expected)
    with pytest.raises(ValueError, match=r"dim is 2; x of shape \(2, 3\) has 2 dimensions"):
        kl_kernels.masked_mean(ONE, MASK, 2)


NUMBERS = [np.float64, np.float32, lambda x: np.array(x), torch.tensor]


@pytest.mark.parametrize("number", NUMBERS)
def test_settings_are_kept_as_pythons_numbers(number):
    made = [
        kl_kernels.UpdateConstraint(max_kl=number(0.5), max_ratio=number(4.0)),
        monitor.Limits(
            **{f.name: number(0.5) for f in dataclasses.fields(monitor.Limits)},
        ),
        kl_kernels.KLEarlyStop(number(0.5), tolerance=number(2.0)),
    ]
    for settings in made:
        kept = [v for v in vars(settings).values() if not isinstance(v, str)]
        assert {type(v) for v in kept} == {float}
    assert made[2].limit == 1.0
    assert not made[2].before_step(number(0.5))
    assert made[2].before_step(number(2.0))
    event = made[0].check(np.int64(3), kl=number(0.75))
    assert (event.step, event.value, event.limit) == (3, 0.75, 0.5)
    assert json.dumps(dataclasses.asdict(event))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_monitor_sees_the_same_in_numbers_of_any_type(number):
    ours, plain = (kl_kernels.KLMonitor(kl_budget=of(8.0)) for of in (number, float))
    rising = [0.0, *[0.5] * 20, 4.0, 12.0, 16.0]
    for step, kl in enumerate(rising):
        given = {
            "kl": kl,
            "kl_coef": 0.5,
            "entropy": 2.0,
            "ratio": 1.5,
            "reward": kl,
            "grad_norm": 1.0,
        }
        events = ours.observe(
            np.int64(step), **{name: number(value) for name, value in given.items()}
        )
        assert events == plain.observe(step, **given)
    state = ours.state_dict()
    assert json.loads(json.dumps(state, allow_nan=False)) == state == plain.state_dict()


@pytest.mark.parametrize("name", ["kl", "kl_coef", "entropy", "ratio", "reward", "grad_norm"])
def test_a_monitor_names_what_is_no_number_and_stays_as_it_was(name):
    watcher = kl_kernels.KLMonitor()
    watcher.observe(0, kl=0.0)
    before = watcher.state_dict()
    for wrong in ("1.5", [1.5], True, np.ones(2)):
        with pytest.raises(TypeError, match=f"^{name} is .*a number"):
            watcher.observe(1, **{"kl": 1.0, name: wrong})
    with pytest.raises(TypeError, match=r"^step is 1\.5.*an integer"):
        watcher.observe(1.5, kl=1.0)
    assert watcher.state_dict() == before


def test_a_measured_number_may_come_with_its_graph():
    kl = (torch.ones(2, requires_grad=True) * 3).sum()
    control = kl_kernels.FixedKLController(0.1)
    assert control.update(kl, 64).kl == 6.0
    assert kl_kernels.KLMonitor(kl_budget=5.0).observe(3, kl=kl)[0].value == 6.0
    assert kl_kernels.KLEarlyStop(0.1).before_step(kl)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_ppo_configuration_keeps_pythons_numbers(number):
    config = PPOConfig(kl_coef=number(0.25), layers=np.int64(2), max_ratio=number(8.0))
    plain = PPOConfig(kl_coef=0.25, layers=2, max_ratio=8.0)
    assert config == plain
    assert config.to_json() == plain.to_json()
    assert PPOConfig.from_json(config.to_json()) == plain
