"""KLMonitorCallback in transformers' own Trainer: it watches, and never ends a run by itself."""

import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kl_kernels import KLMonitor
from kl_kernels.integrations.trl_callback import STATE_KEY, KLMonitorCallback

ROW = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}


class Logs(Trainer):
    """Logs a KL beside the loss, as GRPOTrainer does: the next of `kls`, then always the last."""

    kls = (0.01,)

    def log(self, logs, start_time=None):
        if "loss" in logs:
            step = self.state.global_step
            logs["kl"] = self.kls[min(step, len(self.kls)) - 1]
        super().log(logs, start_time)


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self):
        self.steps, self.metrics, self.alerts = [], [], []

    def log(self, step, metrics):
        self.steps.append(step)
        self.metrics.append(dict(metrics))

    def alert(self, event):
        self.alerts.append(event)

    def close(self):
        pass


def make_trainer(folder, callback, kls=(0.01,), **options):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    how = {
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "per_device_train_batch_size": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = Logs(
        LlamaForCausalLM(config),
        TrainingArguments(str(folder), **how | options),
        train_dataset=[ROW] * 8,
        eval_dataset=[ROW] * 2,
        callbacks=[callback],
    )
    trainer.kls = kls
    return trainer


def make_callback(**options):
    sink = Kept()
    monitor = KLMonitor(unit="token_mean", sinks=[sink])
    return KLMonitorCallback(monitor, **options), sink


@pytest.fixture
def silent():
    """Turn this package's warnings into errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=RuntimeWarning)
        yield


def test_stages_of_one_trainer_count_on(tmp_path, silent):
    """A curriculum: train, change the data, train on; global_step begins anew each time."""
    callback, sink = make_callback()
    trainer = make_trainer(tmp_path, callback)
    for stage in range(3):
        trainer.train()
        assert trainer.state.global_step == 3
        assert sink.steps == list(range(1, 3 * stage + 4))


def test_a_second_stage_keeps_the_baseline_of_the_first(tmp_path, silent):
    """Detectors take 16 values to know the noise: those of both stages."""
    callback, sink = make_callback()
    noise = torch.Generator().manual_seed(0)
    kls = (0.1 + 0.01 * torch.randn(20, generator=noise)).tolist()
    trainer = make_trainer(tmp_path, callback, kls, max_steps=12)
    trainer.train()
    trainer.kls = [*kls[12:19], 5.0]
    trainer.args.max_steps = 8
    trainer.train()
    assert [(e.kind, e.step) for e in callback.events] == [("kl_jump", 20)]
    assert sink.alerts == callback.events


def test_trainers_that_share_a_callback_count_on(tmp_path, silent):
    callback, sink = make_callback()
    for _ in range(2):
        make_trainer(tmp_path, callback, max_steps=2).train()
    assert sink.steps == [1, 2, 3, 4]


def test_a_monitor_that_was_fed_before_counts_on(tmp_path, silent):
    callback, sink = make_callback()
    callback.monitor.observe(500, kl=0.01)
    make_trainer(tmp_path, callback, max_steps=2).train()
    assert sink.steps == [500, 501, 502]


def test_evaluation_has_no_figures_for_it(tmp_path, silent):
    callback, sink = make_callback()
    make_trainer(tmp_path, callback, eval_strategy="steps", eval_steps=1).train()
    assert sink.steps == [1, 2, 3]


def resumed(folder, kls, *, stages, logging_steps):
    """Train with a run that is stopped in its last stage and continued in another process."""
    options = {
        "max_steps": 6,
        "logging_steps": logging_steps,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    callback, whole = make_callback()
    trainer = make_trainer(folder, callback, kls, **options)
    for _ in range(stages):
        trainer.train()
    again, sink = make_callback()
    trainer = make_trainer(folder, again, kls, **options)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    return whole, sink, callback.monitor.state_dict(), again.monitor.state_dict()


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("logging_steps", [1, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(tmp_path, silent, stages, logging_steps):
    kls = [0.1, 0.12, 0.09, 0.11, 0.1, 0.13]
    whole, sink, of_whole, of_resumed = resumed(
        tmp_path, kls, stages=stages, logging_steps=logging_steps
    )
    assert sink.steps == whole.steps[-len(sink.steps) :]
    seen = [[m["kl_token_mean"] for m in s.metrics[-len(sink.steps) :]] for s in (sink, whole)]
    assert seen[0] == seen[1]
    jumps = [state["detectors"]["kl_jump"] for state in (of_resumed, of_whole)]
    assert jumps[0] == jumps[1]


@pytest.mark.parametrize(
    "other",
    [
        {"offset": 0, "monitor": KLMonitor(unit="sequence_sum").state_dict()},
        {"offset": 0, "monitor": KLMonitor(unit="token_mean").state_dict() | {"detectors": {}}},
        {"offset": 0},
        {"offset": "0", "monitor": KLMonitor(unit="token_mean").state_dict()},
        KLMonitor(unit="token_mean").state_dict(),
        [1, 2],
    ],
)
def test_the_state_of_another_monitor_is_left_out_and_told_once(tmp_path, other):
    options = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, make_callback()[0], **options).train()
    file = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(file.read_text())
    state["stateful_callbacks"][STATE_KEY] = other
    file.write_text(json.dumps(state))
    callback, sink = make_callback()
    trainer = make_trainer(tmp_path, callback, max_steps=6)
    with pytest.warns(RuntimeWarning, match="is another monitor's, and is left out") as told:
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert sum(w.category is RuntimeWarning for w in told) == 1
    assert sink.steps == [4, 5, 6]


def test_a_kl_that_is_not_a_number_ends_no_run(tmp_path, silent):
    callback, sink = make_callback()
    make_trainer(tmp_path, callback, [0.1, math.nan, math.inf], max_steps=4).train()
    assert [(e.kind, e.step) for e in callback.events] == [
        ("non_finite", 2),
        ("non_finite", 3),
        ("non_finite", 4),
    ]
    assert sink.steps == [1, 2, 3, 4]


def on_log(callback, step, logs, control=None):
    callback.on_log(None, TrainerState(global_step=step), control or TrainerControl(), logs)


def thrice(callback, logs):
    for step in (1, 2, 3):
        on_log(callback, step, logs)


@pytest.mark.parametrize(
    "figure",
    [0.25, "0.25", torch.tensor(0.25), torch.tensor([[0.25]]), np.float32(0.25), np.array([0.25])],
    ids=repr,
)
def test_a_figure_is_a_number_in_whatever_form(figure, silent):
    callback, sink = make_callback()
    on_log(callback, 1, {"loss": 1.0, "kl": figure, "entropy": figure})
    assert sink.metrics == [{"kl_token_mean": 0.25, "entropy": 0.25}]


NO_NUMBERS = {
    "text": "n/a",
    "no text": "",
    "list": [0.1, 0.2],
    "dict": {},
    "tensor": torch.ones(2, 3),
    "array": np.ones(2),
    "object": object(),
    "too large": 10**400,
}


@pytest.mark.parametrize("kind", NO_NUMBERS)
@pytest.mark.parametrize("name", ["kl", "entropy", "reward", "grad_norm", "objective/kl_coef"])
def test_a_figure_that_is_no_number_is_left_out_and_told_once(name, kind):
    callback, sink = make_callback()
    logs = {"loss": 1.0, "kl": 0.1, name: NO_NUMBERS[kind]}
    with pytest.warns(RuntimeWarning, match=f"(?s)^'{name}' is .* and is left out") as told:
        thrice(callback, logs)
    assert len(told) == 1
    assert sink.metrics == ([] if name == "kl" else [{"kl_token_mean": 0.1}] * 3)


@pytest.mark.parametrize("logs", [None, {}, {"epoch": 1.0}, {"eval_loss": 1.0, "eval_kl": 0.1}])
def test_logs_without_a_training_step_are_none_of_its_business(logs, silent):
    callback, sink = make_callback()
    on_log(callback, 1, logs)
    assert not sink.steps


@pytest.mark.parametrize("logs", [{"loss": 1.0}, {"loss": 1.0, "kl": None}])
def test_a_training_step_without_a_kl_is_told_once(logs):
    callback, sink = make_callback()
    with pytest.warns(RuntimeWarning, match=r"no KL is watched.*is its beta 0") as told:
        thrice(callback, logs)
    assert len(told) == 1
    assert not sink.steps


def test_steps_that_stand_or_go_back_are_never_below_the_last(silent):
    callback, sink = make_callback()
    for step in (5, 5, 2, 3, 3, 1, 9):
        on_log(callback, step, {"kl": 0.1})
    assert sink.steps == [5, 5, 5, 6, 6, 6, 14]


def test_no_figure_however_large_ends_a_run():
    """Squares of them are infinite, which a power says by an error and a product does not."""
    sizes = (0.0, 1e-320, 1.0, -2.0, 3.4e38, 1e160, -1e200, 1.7e308)
    g = torch.Generator().manual_seed(0)
    for _ in range(40):
        callback, _ = make_callback()
        for step in range(100):
            i = torch.randint(2 * len(sizes), (4,), generator=g).tolist()
            kl, entropy, reward, norm = (sizes[k] if k < len(sizes) else 1 + k / 100 for k in i)
            on_log(
                callback, step, {"kl": kl, "entropy": entropy, "reward": reward, "grad_norm": norm}
            )


def test_training_ends_on_the_named_events_alone():
    monitor = KLMonitor(kl_budget=0.5, unit="token_mean")
    callback, control = KLMonitorCallback(monitor, stop_on={"kl_budget"}), TrainerControl()
    on_log(callback, 1, {"kl": math.nan}, control)
    assert not control.should_training_stop
    on_log(callback, 2, {"kl": 0.7}, control)
    assert control.should_training_stop


def test_a_refused_state_leaves_the_monitor_as_it_was():
    """The state may have right first detectors and a wrong later one."""
    monitor = KLMonitor(1.0, unit="token_mean")
    for step in range(20):
        monitor.observe(step, kl=0.1 + step % 3 / 10, entropy=1.0)
    before = copy.deepcopy(monitor.state_dict())
    broken = copy.deepcopy(before)
    for detector in broken["detectors"].values():
        if "values" in detector:
            detector["values"] = [7.0]
    broken["detectors"]["kl_acceleration"] = {"kl": []}
    for state in (broken, broken | {"detectors": None}, {}, None, 3):
        with pytest.raises(ValueError, match=r"^state"):
            monitor.load_state_dict(state)
        assert monitor.state_dict() == before
