"""Versions of the packages whose release can change a result."""

from __future__ import annotations

import importlib.metadata

from kl_kernels._version import __version__

PACKAGES = ("torch", "triton", "numpy", "transformers", "tokenizers", "accelerate")


def versions() -> dict[str, str]:
    """Package and version, this one first; "not installed" where that is so."""
    return {"kl_kernels": __version__, **{package: _version(package) for package in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
