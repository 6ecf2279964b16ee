"""`help()` of every public name stands alone: shapes, arguments, and an example that runs."""

import doctest
import inspect
import re
import typing
import warnings

import pytest

import kl_kernels
from kl_kernels.backends.dispatch import BACKENDS
from kl_kernels.schemas import BackendName

NAMES = sorted(set(kl_kernels.__all__) - {"__version__"})
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Examples):$", re.MULTILINE)
SHAPED = re.compile(r"\[[^\]]*\]")


def sections(name):
    """Split a docstring: the text before its sections under "", each section's under its title."""
    head, *rest = SECTION.split(inspect.getdoc(getattr(kl_kernels, name)))
    return {"": head, **dict(zip(rest[::2], rest[1::2]))}


def entries(text):
    """Return the description of each argument by its name."""
    found = re.split(r"^ {4}(\w+): ", text, flags=re.MULTILINE)
    return {key: " ".join(value.split()) for key, value in zip(found[1::2], found[2::2])}


def parameters(name):
    """Annotations as they are written, by the parameter's name; of a named tuple, of its fields."""
    public = getattr(kl_kernels, name)
    if hasattr(public, "_fields"):
        return {field: str(public.__annotations__[field]) for field in public._fields}
    signature = inspect.signature(public)
    return {p.name: str(p.annotation) for p in signature.parameters.values()}


def described(name):
    title = "Attributes" if hasattr(getattr(kl_kernels, name), "_fields") else "Args"
    return entries(sections(name).get(title, ""))


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_is_described_in_order(name):
    assert list(described(name)) == list(parameters(name))


@pytest.mark.parametrize("name", NAMES)
def test_the_description_of_a_tensor_begins_with_its_shape(name):
    for argument, annotation in parameters(name).items():
        if re.match(r"(ForwardRef\(')?Tensor", annotation):
            assert SHAPED.match(described(name)[argument]), argument


@pytest.mark.parametrize("name", NAMES)
def test_no_argument_sends_its_reader_elsewhere(name):
    for argument, text in described(name).items():
        assert not re.search(r"(^|; )see ", text), argument


@pytest.mark.parametrize("name", NAMES)
def test_choices_are_literal_types(name):
    """An editor completes what it knows: a plain `str` accepts anything."""
    for argument, annotation in parameters(name).items():
        assert not re.search(r"(^|\| )str\b", annotation) or argument in FREE_TEXT, argument


# Paths, and what the user names.
FREE_TEXT = {"path"}

# Imported under TYPE_CHECKING alone, or torch's.
NOT_AT_RUN_TIME = {"ProcessGroup": object, "Path": object}


def choices(name):
    """Yield the values that each argument with a literal type accepts, by the argument's name."""
    public = getattr(kl_kernels, name)
    annotated = public.__init__ if inspect.isclass(public) else public
    for argument, hint in typing.get_type_hints(annotated, localns=NOT_AT_RUN_TIME).items():
        for part in (hint, *typing.get_args(hint)):
            if typing.get_origin(part) is typing.Literal:
                yield argument, typing.get_args(part)


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_is_described(name):
    for argument, accepted in choices(name):
        for choice in accepted:
            assert f'"{choice}"' in described(name)[argument], (argument, choice)


def test_the_type_of_backends_names_those_that_are_there():
    assert set(typing.get_args(BackendName)) == set(BACKENDS)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    public = getattr(kl_kernels, name)
    tests = doctest.DocTestFinder(recurse=False).find(public, name, globs={})
    assert sum(len(test.examples) for test in tests) > 0
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for test in tests:
            runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", NAMES)
def test_formulas_and_behaviour_come_before_the_arguments(name):
    assert sections(name)[""].strip()
