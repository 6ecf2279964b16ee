"""Replacement of a package's functions by others, and its reversal.

Trainers import functions by name, so a function lives in many modules. A patch replaces every
reference to it that the package's loaded modules hold; modules that are loaded later take what they
import from modules that are patched. Undoing looks everywhere again.

Patches may overlap, in any order and from any thread: of all that are in force, a function is the
one of the latest, and the package's own again when the last is undone. They are in force in the
whole process, not in the thread that made them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from types import TracebackType
from typing import Any

from kl_kernels.forks import held_across_forks


class UnsupportedVersionError(RuntimeError):
    """A package is not installed, or is at a version whose functions are not known."""


def supported_version(package: str, supported: Sequence[str]) -> str:
    """Return the one of `supported` ("1.16" stands for every 1.16.x) that is installed.

    Raises:
        UnsupportedVersionError: none of them is.
    """
    accepted = ", ".join(f"{version}.*" for version in supported)
    try:
        installed = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise UnsupportedVersionError(
            f'{package} is not installed: pip install "{package}=={supported[0]}.*"; '
            f"supported: {accepted}"
        ) from None
    for version in supported:
        if f"{installed}.".startswith(f"{version}."):
            return version
    raise UnsupportedVersionError(
        f"{package} is at version {installed}, whose functions kl_kernels does not know; "
        f"supported: {accepted}"
    )


@dataclass(frozen=True)
class Replacement:
    """A function of a package, and its replacement.

    Attributes:
        module: where it is defined.
        name: in that module; "Class.function" for a function of a class.
        parameters: names of the parameters it must have. A release that changed them is refused
            before anything is patched.
        make: returns the replacement, given the package's own function.
    """

    module: str
    name: str
    parameters: tuple[str, ...]
    make: Callable[[Any], Any]

    def owner(self) -> Any:
        """Return the module or class that has the function."""
        path = self.name.split(".")[:-1]
        return functools.reduce(getattr, path, import_module(self.module))

    @property
    def attribute(self) -> str:
        return self.name.split(".")[-1]

    def check(self, original: Any) -> None:
        called = getattr(original, "forward", original)  # an autograd.Function's parameters
        parameters = tuple(inspect.signature(_unwrapped(called)).parameters)
        parameters = tuple(p for p in parameters if p != "ctx")
        if parameters != self.parameters:
            raise UnsupportedVersionError(
                f"{self.module}.{self.name} takes {parameters}, not {self.parameters}: "
                "this release is not the one that kl_kernels knows"
            )


def always(function: Any) -> Callable[[Any], Any]:
    """Return a `Replacement.make` that ignores the package's own function."""
    return lambda original: function


class Patch:
    """Replacements in force, until `undo` or the end of a with-block."""

    def __init__(self, replacements: Sequence[Replacement]) -> None:
        """Put them in force, all or none.

        Raises:
            UnsupportedVersionError: a function is not there, or has other parameters.
        """
        with _lock:
            originals = [_original(replacement) for replacement in replacements]
            for replacement, original in zip(replacements, originals):
                replacement.check(original)
            self._in_force = [
                (_targets.setdefault(_key(r), _Target(r, original)), r.make(original))
                for r, original in zip(replacements, originals)
            ]
            for target, value in self._in_force:
                target.put(value)

    def undo(self) -> None:
        """Take them away; a second call has no effect."""
        with _lock:
            while self._in_force:
                target, value = self._in_force.pop()
                target.remove(value)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


class _Target:
    """A function of a package, and the values that patches have put in its place."""

    def __init__(self, replacement: Replacement, original: Any) -> None:
        self.replacement = replacement
        self.original = original
        self.values: list[Any] = []

    @property
    def current(self) -> Any:
        return self.values[-1] if self.values else self.original

    def put(self, value: Any) -> None:
        before = self.current
        self.values.append(value)
        self._replace(before)

    def remove(self, value: Any) -> None:
        before = self.current
        last = max(i for i, v in enumerate(self.values) if v is value)
        del self.values[last]
        self._replace(before)

    def _replace(self, before: Any) -> None:
        after = self.current
        if before is after:
            return
        owner = self.replacement.owner()
        if inspect.isclass(owner):
            setattr(owner, self.replacement.attribute, after)
            return
        package = self.replacement.module.partition(".")[0]
        for name, module in list(sys.modules.items()):
            if name == package or name.startswith(f"{package}."):
                _replace_in(vars(module), before, after)


def _replace_in(names: dict[str, Any], before: Any, after: Any) -> None:
    for name, value in list(names.items()):
        if value is before:
            names[name] = after


_lock = held_across_forks()  # a child would have half of a patch
_targets: dict[tuple[str, str], _Target] = {}


def _key(replacement: Replacement) -> tuple[str, str]:
    return replacement.module, replacement.name


def _original(replacement: Replacement) -> Any:
    """Return the package's own function, also while it is replaced."""
    if (target := _targets.get(_key(replacement))) is not None:
        return target.original
    try:
        return inspect.getattr_static(replacement.owner(), replacement.attribute)
    except (AttributeError, ModuleNotFoundError):
        raise UnsupportedVersionError(
            f"{replacement.module} has no {replacement.name}: "
            "this release is not the one that kl_kernels knows"
        ) from None


def _unwrapped(function: Any) -> Any:
    """Return the function inside a staticmethod, which a class holds."""
    return getattr(function, "__func__", function)


def replacements_of(
    by_version: Mapping[str, Callable[..., Sequence[Replacement]]], package: str, **options: Any
) -> Sequence[Replacement]:
    """Return the replacements for the installed version of `package`.

    Raises:
        UnsupportedVersionError: there are none.
    """
    return by_version[supported_version(package, tuple(by_version))](**options)
