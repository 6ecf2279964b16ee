"""The packages that are measured beside ours, and their versions here."""

from __future__ import annotations

from importlib import metadata

PACKAGES = (
    "trl",
    "liger-kernel",
    "cut-cross-entropy",
    "flash-linear-attention",
    "quack-kernels",
    "verl",
)


def peer_versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
