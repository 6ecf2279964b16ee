"""Watching a policy drift from its reference: alarms, constraints, audit. Knows no trainer."""

from kl_kernels.monitor.drift import DriftSummary, summarize_drift
from kl_kernels.monitor.events import Event, Sink
from kl_kernels.monitor.limits import Limits
from kl_kernels.monitor.monitor import KLMonitor

__all__ = ["DriftSummary", "Event", "KLMonitor", "Limits", "Sink", "summarize_drift"]
