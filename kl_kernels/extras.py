"""Optional packages, and the error message where one is missing."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

# Each package, and the extra of pyproject.toml that installs it.
EXTRAS = {
    "accelerate": "ppo",
    "matplotlib": "ppo",
    "scipy": "ppo",
    "tokenizers": "ppo",
    "transformers": "ppo",
    "peft": "lora",
    "mlflow": "monitor",
    "tensorboard": "monitor",
    "wandb": "monitor",
    "pytest": "bench",
    "pytest_benchmark": "bench",
}
ROOT = Path(__file__).parent.parent


class MissingPackageError(ImportError, ValueError):
    """A package is not installed; the message has the line that installs it.

    An ImportError, as importing it would raise, and a ValueError: on a command line, an argument
    asked for what is not there.
    """


def is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:  # refused by a finder
        return False


def need(purpose: str, *packages: str) -> None:
    """Raise `MissingPackageError` unless all `packages`, of one extra, are installed."""
    if missing := [package for package in packages if not is_installed(package)]:
        raise MissingPackageError(sentence(purpose, *missing))


def load(purpose: str, package: str, module: str) -> Any:
    """Import `module` of `package`; MissingPackageError where that cannot be done."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(sentence(purpose, package)) from error


def sentence(purpose: str, *missing: str) -> str:
    """Sentence that names the missing packages of one extra and the command that installs them."""
    are = "is" if len(missing) == 1 else "are"
    return (
        f"{purpose} needs {', '.join(missing)}, which {are} not installed: "
        f"{pip_install(EXTRAS[missing[0]])}"
    )


def of_extra(extra: str) -> tuple[str, ...]:
    """The packages that `extra` installs."""
    return tuple(package for package, its in EXTRAS.items() if its == extra)


def pip_install(extra: str) -> str:
    """The command that installs an extra. In a checkout it leaves the build where it is."""
    if (ROOT / "pyproject.toml").is_file():
        return f'pip install --no-build-isolation -e "{ROOT}[{extra}]"'
    return f'pip install "kl_kernels[{extra}]"'
