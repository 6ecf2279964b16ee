"""Replacing functions of a package that is made here, with modules that import by name."""

import importlib
import os
import random
import signal
import sys
import threading
from importlib import metadata

import pytest

from kl_kernels.integrations import patching
from kl_kernels.integrations.patching import Patch, Replacement, UnsupportedVersionError

FILES = {
    "__init__.py": "",
    "utils.py": "def double(x, scale=2):\n    return x * scale\n",
    "early.py": "from .utils import double as twice\ndef use(x):\n    return twice(x)\n",
    "late.py": "from .utils import double\ndef use(x):\n    return double(x)\n",
    "trainer.py": (
        "class Trainer:\n"
        "    @staticmethod\n"
        "    def loss(x):\n        return x\n"
        "    def step(self, x):\n        return self.loss(x)\n"
    ),
}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of which `utils`, `early` and `trainer` are loaded, and `late` is not."""
    folder = tmp_path / "someones_trainer"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(patching, "_targets", {})
    importlib.import_module("someones_trainer.early")
    yield lambda name: importlib.import_module(f"someones_trainer.{name}")
    for name in [n for n in sys.modules if n.partition(".")[0] == "someones_trainer"]:
        del sys.modules[name]


def double_becomes(factor):
    return Replacement(
        "someones_trainer.utils", "double", ("x", "scale"), lambda original: lambda x: factor * x
    )


def test_every_reference_is_replaced_and_comes_back(package):
    original = package("utils").double
    with Patch([double_becomes(10)]):
        assert package("utils").double(1) == 10
        assert package("early").use(1) == 10
        assert package("late").use(1) == 10  # loaded while the patch is in force
    for name, attribute in (("utils", "double"), ("early", "twice"), ("late", "double")):
        assert getattr(package(name), attribute) is original


def test_a_function_of_a_class(package):
    trainer = package("trainer").Trainer
    replacement = Replacement(
        "someones_trainer.trainer",
        "Trainer.loss",
        ("x",),
        lambda original: staticmethod(lambda x: original.__func__(x) + 1),
    )
    original = vars(trainer)["loss"]
    with Patch([replacement]):
        assert trainer().step(1) == 2
    assert vars(trainer)["loss"] is original


def test_an_exception_undoes_it_too(package):
    with pytest.raises(ZeroDivisionError), Patch([double_becomes(10)]):
        raise ZeroDivisionError
    assert package("early").use(1) == 2


@pytest.mark.parametrize("first_undone", [0, 1])
def test_patches_overlap_in_any_order(package, first_undone):
    patches = [Patch([double_becomes(10)]), Patch([double_becomes(100)])]
    assert package("early").use(1) == 100  # the latest
    patches[first_undone].undo()
    assert package("early").use(1) == (100, 10)[first_undone]
    patches[1 - first_undone].undo()
    assert package("early").use(1) == 2
    patches[0].undo()  # once more changes nothing
    assert package("early").use(1) == 2


def test_one_replacement_in_two_patches(package):
    shared = lambda x: 10 * x  # noqa: E731  the same object from both
    same = Replacement("someones_trainer.utils", "double", ("x", "scale"), lambda original: shared)
    one, other = Patch([same]), Patch([same])
    one.undo()
    assert package("early").use(1) == 10
    other.undo()
    assert package("early").use(1) == 2


def test_threads(package):
    package("late")
    start = threading.Barrier(8)
    failures = []

    def work(seed):
        generator = random.Random(seed)
        start.wait()
        for _ in range(200):
            with Patch([double_becomes(10 + seed)]):
                if package(generator.choice(("early", "late"))).use(1) not in range(10, 18):
                    failures.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert package("early").use(1) == package("late").use(1) == 2


def test_a_function_that_changed_is_refused_before_anything_is_patched(package):
    changed = Replacement("someones_trainer.utils", "double", ("x", "factor"), lambda f: f)
    loss = Replacement("someones_trainer.trainer", "Trainer.loss", ("x",), lambda f: None)
    original = vars(package("trainer").Trainer)["loss"]
    with pytest.raises(UnsupportedVersionError, match=r"utils\.double takes \('x', 'scale'\)"):
        Patch([loss, changed])
    assert vars(package("trainer").Trainer)["loss"] is original


def test_a_function_that_is_gone_is_named(package):
    gone = Replacement("someones_trainer.utils", "triple", (), lambda f: f)
    with pytest.raises(UnsupportedVersionError, match=r"utils has no triple"):
        Patch([gone])


@pytest.mark.parametrize(
    ("module", "name"),
    [("nowhere", "double"), ("trainer", "Critic.loss"), ("trainer", "Trainer.inner.loss")],
)
def test_a_module_or_class_that_is_gone_is_named(package, module, name):
    gone = Replacement(f"someones_trainer.{module}", name, (), lambda f: f)
    with pytest.raises(UnsupportedVersionError, match=rf"{module} has no {name}"):
        Patch([gone])


@pytest.mark.parametrize(
    ("installed", "found"),
    [("1.16.0", "1.16"), ("1.16.3.dev1", "1.16"), ("1.1.9", "1.1"), ("1.16", "1.16")],
)
def test_a_supported_version_is_found(monkeypatch, installed, found):
    monkeypatch.setattr(metadata, "version", lambda name: installed)
    assert patching.supported_version("someones_trainer", ("1.16", "1.1")) == found


def test_an_unknown_version_names_the_known_ones(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "1.160.2")
    with pytest.raises(UnsupportedVersionError, match=r"version 1\.160\.2.*supported: 1\.16\.\*"):
        patching.supported_version("someones_trainer", ("1.16",))


def test_a_package_that_is_not_there_is_named():
    with pytest.raises(UnsupportedVersionError, match="someones_trainer is not installed"):
        patching.supported_version("someones_trainer", ("1.16",))


def test_a_fork_waits_for_a_patch_that_another_thread_is_making(package):
    """Otherwise the child has half of the patch, and a lock that is never released."""
    making, go_on = threading.Event(), threading.Event()

    def slowly(original):
        making.set()
        go_on.wait(30)
        return lambda x: 10 * x

    slow = Replacement("someones_trainer.utils", "double", ("x", "scale"), slowly)
    patches = []
    thread = threading.Thread(target=lambda: patches.append(Patch([slow])))
    thread.start()
    making.wait(30)
    threading.Timer(0.2, go_on.set).start()
    if (child := os.fork()) == 0:
        signal.alarm(60)  # it would wait for ever
        seen = package("early").use(1)
        Patch([double_becomes(7)]).undo()
        os._exit(seen)
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10
    patches[0].undo()
    assert package("early").use(1) == 2
