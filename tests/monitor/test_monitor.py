"""KLMonitor as trainers use it: reductions, state, sinks, ranks, what it refuses."""

import ast
import json
import math
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from series import alarms, ar1

import kl_kernels
from kl_kernels import FixedKLController, KLMonitor
from kl_kernels.monitor import Limits

MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0], [0, 0, 1], [1, 1, 0]])


def batch(seed=0):
    """Everything a trainer has; NaN wherever the mask is 0."""
    generator = torch.Generator().manual_seed(seed)
    names = ("kl", "entropy", "ratio")
    tensors = {name: torch.rand(*MASK.shape, generator=generator) for name in names}
    tensors["logprob"] = -torch.rand(*MASK.shape, generator=generator)
    tensors = {name: x.masked_fill(MASK == 0, torch.nan) for name, x in tensors.items()}
    return tensors | {"reward": torch.rand(len(MASK), generator=generator)}


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.logged, self.alerts = [], []

    def log(self, step, metrics):
        self.logged.append((step, dict(metrics)))

    def alert(self, event):
        self.alerts.append(event)

    def close(self):
        pass


def metrics(unit="sequence_sum", **inputs):
    sink = Kept()
    KLMonitor(unit=unit, sinks=[sink]).observe(1, **inputs)
    return sink.logged[0][1]


def named(inputs, unit="sequence_sum"):
    """Rename metrics as sinks get them: names tell the unit, or the reduction."""
    names = {"kl": f"kl_{unit}", "ratio": "ratio_max"}
    return {names.get(name, name): value for name, value in inputs.items()}


def expected(unit, tensors, mask=MASK):
    """Reduce by loops over the unmasked positions."""
    kept = [
        [float(x) for x, m in zip(row, mask_row) if m]
        for row, mask_row in zip(tensors["kl"].double(), mask)
    ]
    sums = [sum(row) for row in kept if row]
    n_tokens = sum(map(len, kept))
    entropy = [float(x) for x, m in zip(tensors["entropy"].flatten(), mask.flatten()) if m]
    ratio = [float(x) for x, m in zip(tensors["ratio"].flatten(), mask.flatten()) if m]
    logprob = [float(x) for x, m in zip(tensors["logprob"].flatten(), mask.flatten()) if m]
    gaps = [-one - other for one, other in zip(logprob, entropy)]
    reduced = {
        "kl": sum(sums) / (len(sums) if unit == "sequence_sum" else n_tokens),
        "entropy": sum(entropy) / n_tokens,
        "sampling_gap": sum(gaps) / n_tokens,
        "sampling_gap_error": math.sqrt(sum(gap**2 for gap in gaps)) / n_tokens,
        "ratio": max(ratio),
        "reward": sum(map(float, tensors["reward"])) / len(mask),
    }
    return named(reduced, unit)


@pytest.mark.parametrize("unit", ["sequence_sum", "token_mean"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_tensors_are_reduced_under_the_mask(unit, dtype):
    tensors = batch()
    found = metrics(unit, **tensors, mask=MASK.to(dtype))
    assert found == pytest.approx(expected(unit, tensors), rel=1e-12)


def test_numbers_are_taken_as_they_are():
    inputs = {"kl": 3.0, "kl_coef": 0.1, "entropy": 2.0, "ratio": 1.1, "grad_norm": 0.5}
    assert metrics(**inputs, reward=-1) == named(inputs) | {"reward": -1.0}
    assert metrics(kl=torch.tensor(3.0), grad_norm=torch.tensor(0.5), mask=MASK) == {
        "kl_sequence_sum": 3.0,
        "grad_norm": 0.5,
    }
    assert metrics(kl=np.float32(3)) == {"kl_sequence_sum": 3.0}


def test_gradients_stay_out_of_the_monitor():
    tensors = {name: x.requires_grad_() for name, x in batch().items()}
    assert metrics(**tensors, mask=MASK) == metrics(**batch(), mask=MASK)


def test_a_batch_without_tokens_has_nothing_to_watch():
    found = metrics(**batch(), mask=torch.zeros_like(MASK))
    assert set(found) == {"reward"}


def observe_on_rank(group, unit):
    rows = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 5)][dist.get_rank(group)]
    sink = Kept()
    monitor = KLMonitor(kl_budget=0.1, unit=unit, sinks=[sink])
    own = {name: x[rows] for name, x in batch().items()}
    events = monitor.observe(0, **own, mask=MASK[rows], grad_norm=1.0, group=group)
    empty = {name: x[:0] for name, x in batch().items() if name != "reward"}
    monitor.observe(1, **empty, mask=MASK[:0], group=group)
    monitor.observe(2, kl=3.0, group=group)
    return sink.logged, [str(event) for event in events]


@pytest.mark.parametrize("unit", ["sequence_sum", "token_mean"])
def test_all_ranks_see_the_figures_of_the_whole_batch(ranks, unit):
    found = ranks(observe_on_rank, unit, n=4)
    assert all(of_rank == found[0] for of_rank in found)
    logged, events = found[0]
    whole = expected(unit, batch()) | {"grad_norm": 1.0}
    assert logged[0][1] == pytest.approx(whole, rel=1e-12)
    assert logged[1:] == [(1, {}), (2, named({"kl": 3.0}, unit))]
    assert len(events) == 2  # start_kl, kl_budget


def test_what_is_not_finite_is_named_each_time():
    monitor = KLMonitor()
    for step, bad in enumerate((math.nan, math.inf, -math.inf)):
        events = monitor.observe(step, kl=bad, entropy=1.0, reward=bad, kl_coef=bad)
        assert [event.kind for event in events] == ["non_finite"] * 3
        named = {event.message.split()[0] for event in events}
        assert named == {"kl", "reward", "kl_coef"}


@pytest.mark.parametrize("name", ["kl", "entropy", "ratio", "reward"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_unmasked_value_that_is_not_finite_shows(name, bad):
    tensors = batch()
    tensors[name][(0, 0) if name != "reward" else 0] = bad
    events = KLMonitor().observe(1, **tensors, mask=MASK)
    named = [event.message.split()[0] for event in events if event.kind == "non_finite"]
    assert named == ([name, "sampling_gap"] if name == "entropy" else [name])


def test_values_that_are_not_finite_leave_no_trace():
    rng = np.random.default_rng(0)
    series = {name: ar1(rng, 200) for name in ("kl", "entropy", "ratio", "reward", "grad_norm")}
    series["kl"][150:] += 0.5
    clean, dirty = KLMonitor(), KLMonitor()
    events = []
    for t in range(200):
        observed = {name: float(x[t]) for name, x in series.items()}
        events += [e.kind for e in clean.observe(t + 1, **observed)]
        dirty.observe(t + 1, **observed)
        if t % 7 == 0:
            dirty.observe(t + 1, **dict.fromkeys(observed, (math.nan, math.inf)[t % 2]))
    assert "kl_drift" in events
    assert clean.state_dict() == dirty.state_dict()


def everything(n, seed=0):
    """A run with an event of almost every kind."""
    rng = np.random.default_rng(seed)
    t = np.arange(n)
    series = {
        "kl": ar1(rng, n) + 0.6 * (t > 90) + 2 * (t > 130) - 10 * (t > 180),
        "entropy": ar1(rng, n, level=2) - 1.5 * (t > 100),
        "ratio": ar1(rng, n, level=1) + 20 * (t % 50 == 40),
        "reward": ar1(rng, n, level=0) + np.maximum(t - 110, 0) * 0.1,
        "grad_norm": np.exp(ar1(rng, n, level=0)) + 10 * (t == 140),
    }
    return [{name: float(x[i]) for name, x in series.items()} for i in range(n)]


def observe_all(monitor, observed, start=0):
    return [e for i, inputs in enumerate(observed, start) for e in monitor.observe(i + 1, **inputs)]


def through_torch(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("way", ["json", "torch", "pickle", "same object"])
def test_a_resumed_monitor_tells_what_an_uninterrupted_one_does(way, tmp_path):
    observed = everything(220)
    whole = observe_all(KLMonitor(6.0), observed)
    assert len({event.kind for event in whole}) >= 7
    for cut in (0, 10, 23, 60, 95, 131, 200):
        first = KLMonitor(6.0)
        events = observe_all(first, observed[:cut])
        if way == "pickle":
            second = pickle.loads(pickle.dumps(first))
        else:
            state = first.state_dict()
            if way == "json":
                state = json.loads(json.dumps(state))
            elif way == "torch":
                state = through_torch(state, tmp_path)
            second = KLMonitor(6.0)
            second.load_state_dict(state)
            observe_all(first, observed[cut:], cut)  # the saved state is not the monitor's own
        assert events + observe_all(second, observed[cut:], cut) == whole


@pytest.mark.parametrize("state", [{}, None, {"unit": "sequence_sum", "step": 3}])
def test_a_state_of_nobody_is_refused(state):
    with pytest.raises(ValueError, match=r"state is of .* of a KLMonitor returned"):
        KLMonitor().load_state_dict(state)


def test_the_state_of_a_controller_is_refused_by_name():
    state = FixedKLController(0.1).state_dict()
    with pytest.raises(ValueError, match=r"state is of FixedKLController; .* of a KLMonitor"):
        KLMonitor().load_state_dict(state)
    with pytest.raises(ValueError, match=r"state is of KLMonitor; .* of a FixedKLController"):
        FixedKLController(0.1).load_state_dict(KLMonitor().state_dict())
    for part in ("step", "unit", "detectors"):
        state = KLMonitor().state_dict()
        del state[part]
        with pytest.raises(ValueError, match=f"state of KLMonitor has no '{part}'"):
            KLMonitor().load_state_dict(state)


def test_a_state_of_something_else_is_refused():
    state = KLMonitor().state_dict()
    with pytest.raises(ValueError, match="sequence_sum"):
        KLMonitor(unit="token_mean").load_state_dict(state)
    KLMonitor(30.0).load_state_dict(state)  # a budget may come and go
    del state["detectors"]["kl_drift"]
    with pytest.raises(ValueError, match="detectors"):
        KLMonitor().load_state_dict(state)
    state = KLMonitor().state_dict()
    del state["detectors"]["kl_drift"]["sums"]
    with pytest.raises(ValueError, match="kl_drift"):
        KLMonitor().load_state_dict(state)


def test_steps_cannot_go_back():
    monitor = KLMonitor()
    monitor.observe(5, kl=1.0)
    monitor.observe(5, kl=1.0)
    with pytest.raises(ValueError, match="step is 4, after step 5"):
        monitor.observe(4, kl=1.0)
    again = KLMonitor()
    again.load_state_dict(monitor.state_dict())
    with pytest.raises(ValueError, match="step is 4"):
        again.observe(4, kl=1.0)
    with pytest.raises(TypeError):
        monitor.observe(5.5, kl=1.0)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ({"kl": torch.zeros(2, 3)}, ValueError, "kl has shape .* needs a mask"),
        ({"kl": torch.zeros(3), "mask": torch.ones(3)}, ValueError, "kl has shape"),
        ({"kl": torch.zeros(5, 2), "mask": MASK}, ValueError, "mask has shape"),
        ({"kl": 1.0, "ratio": torch.zeros(2, 2), "mask": MASK}, ValueError, "mask has shape"),
        ({"kl": 1.0, "reward": torch.zeros(2, 2)}, ValueError, "reward has shape"),
        ({"kl": "much"}, TypeError, "kl is 'much'"),
        ({"kl": 1.0, "grad_norm": torch.zeros(2)}, TypeError, "grad_norm is"),
    ],
)
def test_what_cannot_be_reduced_is_refused_and_changes_nothing(inputs, error, message):
    monitor = KLMonitor()
    before = monitor.state_dict()
    with pytest.raises(error, match=message):
        monitor.observe(1, **inputs)
    assert monitor.state_dict() == before


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match="unit is"):
        KLMonitor(unit="nats")
    with pytest.raises(ValueError, match="kl_budget is"):
        KLMonitor(kl_budget=0.0)


def test_sinks_get_all_metrics_and_all_events():
    sinks = [Kept(), Kept()]
    monitor = KLMonitor(6.0, sinks=sinks)
    observed = everything(200)
    events = observe_all(monitor, observed)
    for sink in sinks:
        assert sink.alerts == events
        assert sink.logged == [(i + 1, named(inputs)) for i, inputs in enumerate(observed)]


class Broken(Kept):
    def log(self, step, metrics):
        super().log(step, metrics)
        raise OSError("disk full")


def test_a_sink_that_raises_is_warned_of_once_and_training_goes_on():
    broken, sound = Broken(), Kept()
    monitor = KLMonitor(6.0, sinks=[broken, sound])
    with pytest.warns(RuntimeWarning, match="Broken raised OSError.*disk full.* at step 1"):
        assert monitor.observe(1, kl=1.0) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2, 6):
            assert len(monitor.observe(step, kl=7.0 if step == 3 else 1.0)) == (step == 3)
    assert len(sound.logged) == len(broken.logged) == 5
    assert len(sound.alerts) == 1


@settings(max_examples=25, deadline=None)
@given(
    scale=st.floats(1e-6, 1e6),
    level=st.floats(-1e3, 1e3),
    seed=st.integers(0, 1000),
    change=st.sampled_from([0.3, 0.5, -0.5, 2.0, -2.0]),
)
def test_jump_and_drift_know_neither_zero_nor_unit(scale, level, seed, change):
    """The series times a scale, plus a level: alarms at the same steps."""
    series = ar1(np.random.default_rng(seed), 150, level=0.0)
    series[80:] += change
    kinds = {"kl_jump", "kl_drift"}
    limits = Limits(negative_kl=1e300)

    def found(values):
        return [alarm for alarm in alarms(values, KLMonitor(limits=limits)) if alarm[1] in kinds]

    assert abs(change) < 2 or (80, "kl_jump") in found(series)
    assert found(scale * (series + level)) == found(series)


def test_the_folder_knows_neither_kernels_nor_trainers():
    allowed = {
        "checks",
        "extras",
        "files",
        "forks",
        "monitor",
        "rl.collectives",
        "rl.masked",
        "rl.measure",
        "rl.sampling",
        "rl.sequences",
        "versions",
    }
    folder = Path(kl_kernels.__file__).parent / "monitor"
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                modules = [node.module]
                if node.module == "kl_kernels":
                    modules = [f"kl_kernels.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                package, _, inner = module.partition(".")
                if package == "kl_kernels":
                    assert inner in allowed or inner.startswith("monitor."), (path, module)
                assert package not in ("triton", "transformers", "trl", "verl"), (path, module)
