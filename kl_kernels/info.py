"""Versions, devices, and which backends are there: what a bug report needs."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from kl_kernels._version import __version__
from kl_kernels.dispatch import BACKENDS

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No arguments."""


def run(args: argparse.Namespace) -> int:
    for name, value in facts().items():
        print(f"{name:14}{value}")
    return 0


def facts() -> dict[str, str]:
    """Name and one line for each fact, in the order they are shown."""
    return {
        "kl_kernels": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        **{package: _version(package) for package in PACKAGES},
        "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "gpu": _gpus(),
        **{f"[{name}]": _availability(name) for name in BACKENDS},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(names) or "none"


def _availability(name: str) -> str:
    backend = BACKENDS[name]
    if reason := backend.unavailable_reason():
        return f"not available: {reason}"
    devices = " and ".join(backend.device_types) or "any"
    return f"available for {devices} tensors"
