"""Simulated KL series, and what a monitor says about them."""

import numpy as np

from kl_kernels import KLMonitor

LEVEL_KINDS = ("kl_jump", "kl_drift")


def ar1(rng, n, phi=0.6, sd=0.1, level=5.0):
    """From its stationary distribution on; sd is that of the noise that drives it."""
    x = rng.normal(0, sd, n)
    x[0] /= np.sqrt(1 - phi * phi)
    for t in range(1, n):
        x[t] += phi * x[t - 1]
    return level + x


def alarms(series, monitor=None):
    """(index, kind) of the events that a KL series alone raises; it starts at step 1."""
    monitor = KLMonitor() if monitor is None else monitor
    return [
        (t, event.kind)
        for t, value in enumerate(series)
        for event in monitor.observe(t + 1, kl=float(value))
    ]
