"""Versions of the packages whose release can change a result."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

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


def commit() -> str:
    """The commit that runs, with "+changes" if files differ from it; "unknown" without git.

    An installed package is no part of the repository that it may lie in.
    """

    def git(*args: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
