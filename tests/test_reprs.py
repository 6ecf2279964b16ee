"""The repr of an object with a state shows its arguments and that state."""

import pytest

from kl_kernels import (
    AdaptiveKLController,
    AuditLog,
    FixedKLController,
    KLEarlyStop,
    KLMonitor,
    PIKLController,
    ThresholdKLController,
    UpdateConstraint,
)
from kl_kernels.monitor import Limits


def test_controllers_show_their_arguments_and_the_present_coefficient():
    fixed = FixedKLController(0.1, unit="token_mean")
    assert repr(fixed) == "FixedKLController(0.1, unit='token_mean')"
    adaptive = AdaptiveKLController(0.1, 6.0, 1000, unit="sequence_sum", max_coef=2.0)
    adaptive.update(12.0, 500)
    assert repr(adaptive) == (
        "AdaptiveKLController(value=0.11000000000000001, target=6.0, unit='sequence_sum', "
        "min_coef=1e-06, max_coef=2.0, horizon=1000.0, error_clip=0.2)"
    )


@pytest.mark.parametrize("kind", [ThresholdKLController, PIKLController])
def test_every_controller_shows_where_its_coefficient_is(kind):
    controller = kind(0.5, 6.0, unit="token_mean")
    before = repr(controller)
    assert before.startswith(f"{kind.__name__}(value=0.5, target=6.0, unit='token_mean'")
    for _ in range(3):
        controller.update(100.0, 8)
    assert repr(controller) == before.replace("value=0.5", f"value={controller.value!r}")
    assert controller.value != 0.5


def test_an_early_stop_shows_its_limit_and_the_last_kl():
    early_stop = KLEarlyStop(0.02)
    assert repr(early_stop) == "KLEarlyStop(when='before_step', limit=0.03, last_kl=0)"
    early_stop.before_step(0.025)
    assert "last_kl=0.025" in repr(early_stop)


def test_a_monitor_shows_its_arguments_and_step(tmp_path):
    with AuditLog(tmp_path / "a.jsonl") as log:
        monitor = KLMonitor(30.0, limits=Limits(ratio=20.0), sinks=[log])
        monitor.observe(7, kl=1.0)
    shown = repr(monitor)
    assert shown.startswith("KLMonitor(kl_budget=30.0, unit='sequence_sum', limits=Limits(jump=")
    assert "ratio=20.0" in shown
    assert shown.endswith("sinks=[AuditLog], step=7)")
    assert repr(KLMonitor()).endswith("sinks=[], step=None)")


def test_a_constraint_shows_its_limits():
    assert repr(UpdateConstraint(0.1)) == (
        "UpdateConstraint(max_kl=0.1, max_ratio=None, action='log')"
    )


def test_an_audit_log_shows_its_file_length_and_head(tmp_path):
    path = tmp_path / "audit.jsonl"
    log = AuditLog(path)
    log.append("note", {"x": 1})
    assert repr(log) == f"AuditLog({str(path)!r}, records=2, head={log.head[:12]!r}, open)"
    log.close()
    assert repr(log).endswith("closed)")
