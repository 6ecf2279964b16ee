"""Versions, devices and available backends, as a bug report needs them."""

from __future__ import annotations

import argparse
import platform
from contextlib import suppress
from pathlib import Path

import torch

from kl_kernels.backends.dispatch import BACKENDS
from kl_kernels.partitioned.products import refusal
from kl_kernels.versions import versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments."""


def run(args: argparse.Namespace) -> int:
    with suppress(BrokenPipeError):  # the reader has closed the pipe, as `| head` does
        for name, value in facts().items():
            print(f"{name:14}{value}")
    return 0


def facts() -> dict[str, str]:
    """Name and one line for each fact, in the order they are shown."""
    return {
        "python": f"{platform.python_version()} on {platform.platform()}",
        **versions(),
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": _gpus(),
        **{f"[{name}]": _availability(name) for name in BACKENDS},
        "linear heads": _products(),
    }


def _gpus() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"


def _availability(name: str) -> str:
    backend = BACKENDS[name]
    if reason := backend.unavailable_reason():
        return f"not available: {reason}"
    devices = " and ".join(backend.device_types) or "any"
    return f"available for {devices} tensors"


def _products() -> str:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if reason := refusal(device, torch.bfloat16):
        return f"multiply bfloat16 factors in float32 on {device.type}: {reason}"
    return f"multiply bfloat16 factors as they are on {device.type}, and add up in float32"


def device_name() -> str:
    """Return the name of the GPU, or of the CPU where there is no GPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()


def cpu_name() -> str:
    """Return the CPU's name in Linux, or Python's name for it elsewhere."""
    described = Path("/proc/cpuinfo")
    for line in described.read_text().splitlines() if described.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
