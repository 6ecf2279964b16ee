"""Sinks: TensorBoard for real; W&B and MLflow as fakes with the signatures of their libraries.

The fakes take what wandb 0.31 and mlflow 3.17 take, and refuse what these refuse.
"""

import math
import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from kl_kernels.monitor.events import Event
from kl_kernels.monitor.sinks import MLflowSink, TensorBoardSink, WandbSink

EVENT = Event(7, "kl_jump", 3.0, 1.0, "KL per token is 3 nats, limit 1")
TEXT = "step 7: KL per token is 3 nats, limit 1"


def event_files(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(folder, name):
    return [(scalar.step, scalar.value) for scalar in event_files(folder).Scalars(name)]


def test_tensorboard_has_scalars_at_their_steps_and_events_as_text(tmp_path):
    sink = TensorBoardSink(tmp_path, names="trl", prefix="train/")
    sink.log(3, {"kl_token_mean": 0.5, "ratio_max": math.inf})
    sink.log(7, {"kl_token_mean": 0.25, "ratio_max": math.nan})
    sink.alert(EVENT)
    sink.close()
    assert scalars(tmp_path, "train/kl") == [(3, 0.5), (7, 0.25)]
    (_, first), (_, second) = scalars(tmp_path, "train/kl_kernels/ratio_max")
    assert math.isinf(first)
    assert math.isnan(second)
    events = event_files(tmp_path)
    (text,) = events.Tensors("train/events/kl_jump/text_summary")
    assert text.step == 7
    assert text.tensor_proto.string_val == [TEXT.encode()]


def test_an_event_is_on_the_disk_before_the_sink_is_closed(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.alert(EVENT)
    assert event_files(tmp_path).Tags()["tensors"] == ["events/kl_jump/text_summary"]
    sink.close()


def test_a_forked_child_is_refused_where_it_would_wait_for_ever(tmp_path):
    """TensorBoard's writer queues what a thread takes, and a child has none of its threads."""
    sink = TensorBoardSink(tmp_path)
    sink.log(1, {"entropy": 2.0})
    if (child := os.fork()) == 0:
        told = 0
        for write in (lambda: sink.log(2, {"entropy": 9.0}), lambda: sink.alert(EVENT)):
            try:
                write()
            except ValueError as error:
                told += "a TensorBoardSink belongs to process" in str(error)
        sink.close()  # the child's copy: no effect
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    sink.log(3, {"entropy": 4.0})
    sink.close()
    assert scalars(tmp_path, "entropy") == [(1, 2.0), (3, 4.0)]


def test_a_writer_of_the_callers_stays_open(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        sink.log(1, {"entropy": 2.0})
        sink.close()
        assert scalars(tmp_path, "entropy") == [(1, 2.0)]
        writer.add_scalar("entropy", 3.0, 2)
    assert scalars(tmp_path, "entropy") == [(1, 2.0), (2, 3.0)]


class FakeRun:
    """The part of wandb's Run that the sink uses: parameters, their order, and rising steps."""

    def __init__(self):
        self.rows, self.axes, self.alerts, self.step = [], {}, [], 0

    def log(self, data, step=None, commit=None):
        if step is not None and step < self.step:
            return  # W&B warns and drops them
        self.step = step if step is not None else self.step + 1
        self.rows.append((step, dict(data)))

    def define_metric(
        self, name, step_metric=None, step_sync=None, hidden=None, summary=None, overwrite=None
    ):
        self.axes[name] = step_metric

    def alert(self, title, text, level=None, wait_duration=None):
        assert len(title) < 64
        assert level in ("INFO", "WARN", "ERROR")
        self.alerts.append((title, text, level, wait_duration))


def test_wandb_gets_metrics_at_steps_of_the_run_and_alerts():
    run = FakeRun()
    sink = WandbSink(run, names="verl", level="ERROR", wait_seconds=10)
    sink.log(3, {"entropy": 1.0})
    sink.alert(EVENT)
    sink.alert(Event(8, "x" * 80, 0.0, 0.0, "long"))
    sink.close()
    assert run.rows == [(3, {"actor/entropy": 1.0})]
    assert run.alerts[0] == ("kl_kernels: kl_jump", TEXT, "ERROR", 10)


def test_wandb_can_leave_the_steps_of_the_run_to_others():
    run = FakeRun()
    sink = WandbSink(run, step_metric="train/global_step")
    run.step = 1000
    sink.log(3, {"entropy": 1.0})
    sink.log(4, {"entropy": 1.5, "reward": 2.0})
    assert run.rows == [
        (None, {"entropy": 1.0, "train/global_step": 3}),
        (None, {"entropy": 1.5, "reward": 2.0, "train/global_step": 4}),
    ]
    assert run.axes == {"entropy": "train/global_step", "reward": "train/global_step"}


def test_wandb_without_a_run_takes_the_active_one(monkeypatch):
    wandb = ModuleType("wandb")
    wandb.run = None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with pytest.raises(ValueError, match=r"no run is active; call wandb\.init first"):
        WandbSink()
    wandb.run = FakeRun()
    WandbSink().log(0, {"entropy": 1.0})
    assert wandb.run.rows


@pytest.fixture
def mlflow(monkeypatch):
    class Metric:
        def __init__(self, key, value, timestamp, step, model_id=None):
            self.key, self.value, self.timestamp, self.step = key, value, timestamp, step

    calls = []

    class MlflowClient:
        def __init__(self, tracking_uri=None, registry_uri=None):
            calls.append(("client", tracking_uri))

        def log_batch(self, run_id, metrics=(), params=(), tags=(), synchronous=None):
            assert all(type(m.value) is float and type(m.timestamp) is int for m in metrics)
            calls.append(("log", run_id, [(m.key, m.value, m.step) for m in metrics]))

        def set_tag(self, run_id, key, value, synchronous=None):
            calls.append(("tag", run_id, key, value))

    module = ModuleType("mlflow")
    module.MlflowClient = MlflowClient
    module.entities = SimpleNamespace(Metric=Metric)
    module.active_run = lambda: None
    module.calls = calls
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def test_mlflow_gets_metrics_in_one_call_and_events_as_tags(mlflow):
    sink = MLflowSink("run", names="openrlhf", tracking_uri="sqlite:///x.db")
    sink.log(3, {"entropy": np.float32(1.0), "kl_token_mean": 0.5})
    sink.alert(EVENT)
    sink.close()
    assert mlflow.calls == [
        ("client", "sqlite:///x.db"),
        ("log", "run", [("entropy_loss", 1.0, 3), ("kl_kernels/kl_token_mean", 0.5, 3)]),
        ("tag", "run", "alert.kl_jump", TEXT),
    ]


def test_mlflow_without_a_run_takes_the_active_one(mlflow):
    with pytest.raises(ValueError, match=r"no run is active; call mlflow\.start_run first"):
        MLflowSink()
    mlflow.active_run = lambda: SimpleNamespace(info=SimpleNamespace(run_id="active"))
    MLflowSink().alert(EVENT)
    assert mlflow.calls[-1][1] == "active"


@pytest.mark.parametrize(
    ("module", "package", "make"),
    [
        ("torch.utils.tensorboard", "tensorboard", lambda: TensorBoardSink("folder")),
        ("wandb", "wandb", WandbSink),
        ("mlflow", "mlflow", MLflowSink),
    ],
)
def test_a_missing_library_is_named_when_its_sink_is_made(monkeypatch, module, package, make):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    with pytest.raises(ImportError, match=f"{package}, which is not installed: pip install "):
        make()


@pytest.mark.parametrize("make", [TensorBoardSink, WandbSink, MLflowSink])
def test_other_names_are_refused_before_anything_is_opened(make, tmp_path):
    with pytest.raises(ValueError, match="names is 'rllib'"):
        make(str(tmp_path / "folder"), names="rllib")
    assert not (tmp_path / "folder").exists()
