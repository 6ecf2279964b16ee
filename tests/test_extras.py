"""A missing package is one sentence with the command that installs it, and no traceback."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kl_kernels
from kl_kernels import extras
from kl_kernels.backends import compiled as native
from kl_kernels.cli import COMMANDS, main

ROOT = Path(__file__).parent.parent
HIDDEN = f"""
import contextlib, io, json, sys
sys.modules.update(dict.fromkeys({list(extras.EXTRAS)}))  # None: as if they were not installed
from kl_kernels.cli import COMMANDS, main

def called(*arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    return code, out.getvalue(), err.getvalue()

"""


def without_extras(program):
    """Run a program without the packages of any extra, and return the JSON it prints."""
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN + program], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_every_commands_help_is_there_without_any_extra():
    helps = without_extras("print(json.dumps({n: called(n, '--help') for n in COMMANDS}))")
    assert helps.keys() == COMMANDS.keys()
    for name, (code, out, err) in helps.items():
        assert (code, err) == (0, ""), name
        assert out.startswith(f"usage: python -m kl_kernels {name}")


def test_a_command_that_lacks_its_extra_says_how_to_install_it():
    told = without_extras("print(json.dumps({n: called(n) for n in ('ppo', 'study', 'bench')}))")
    for name, (code, out, err) in told.items():
        extra = "bench" if name == "bench" else "ppo"
        assert (code, out) == (2, "")
        assert err == (
            f"error: {name} needs {', '.join(extras.of_extra(extra))}, which are not installed: "
            f'pip install --no-build-isolation -e "{ROOT}[{extra}]"\n'
        )


def test_the_other_commands_run_without_any_extra(tmp_path):
    log = str(tmp_path / "audit.jsonl")
    kl_kernels.AuditLog(log).close()
    calls = [
        ["info"],
        ["validate", "--quick", "--backend", "cpu"],
        ["codegen", "--arch", "x"],
        ["audit", "verify", log],
        ["audit", "show", log],
    ]
    told = without_extras(f"print(json.dumps([called(*call) for call in {calls}]))")
    assert [code for code, _, _ in told] == [0, 0, 2, 0, 0]
    assert told[2][2].startswith("error: arch is 'x'")


@pytest.mark.parametrize(
    ("package", "arguments"),
    [("wandb", ["--log-to", "wandb"]), ("peft", ["--reference", "adapter"])],
)
def test_what_one_option_needs_is_told_before_a_run_folder_is_made(
    package, arguments, monkeypatch, tmp_path, capsys
):
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["ppo", "--out", str(tmp_path / "run"), *arguments]) == 2
    error = capsys.readouterr().err
    option, value = arguments
    assert error.startswith(f"error: {option[2:].replace('-', '_')} '{value}' needs {package}, ")
    assert f'[{extras.EXTRAS[package]}]"' in error
    assert not (tmp_path / "run").exists()


def test_an_integration_says_what_it_lacks():
    told = without_extras(
        "try:\n    import kl_kernels.integrations.trl\n"
        "except ImportError as error:\n    print(json.dumps(str(error)))"
    )
    assert told.startswith("kl_kernels.integrations.trl needs transformers, which is not installed")


def test_a_missing_package_is_an_import_error_and_a_bad_argument():
    with pytest.raises(extras.MissingPackageError) as raised:
        extras.load("a test", "mlflow", "mlflow.no_such_module")
    assert isinstance(raised.value, ImportError)
    assert isinstance(raised.value, ValueError)


def test_in_an_installation_the_command_names_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(extras, "ROOT", tmp_path)
    assert extras.pip_install("ppo") == 'pip install "kl_kernels[ppo]"'


def test_a_finder_that_refuses_a_package_means_that_it_is_not_installed(monkeypatch):
    class Refuses:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "mlflow":
                raise ModuleNotFoundError(name)

    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Refuses, *sys.meta_path])
    assert not extras.is_installed("mlflow")
    assert extras.is_installed("torch")


def normal(name):
    return re.sub(r"[-_.]+", "_", name).lower()


def test_every_package_is_in_the_extra_that_is_named():
    declared = {}
    for line in importlib.metadata.requires("kl_kernels"):
        if match := re.fullmatch(r"([\w.-]+).*; extra == ['\"]([\w-]+)['\"]", line):
            declared.setdefault(match[2], set()).add(normal(match[1]))
    for package, extra in extras.EXTRAS.items():
        # [bench] has pytest by way of [test].
        assert package in declared[extra] | (declared["test"] if extra == "bench" else set())
    for extra in ("ppo", "lora", "monitor"):
        assert declared[extra] == set(extras.of_extra(extra))


def install_section():
    """README's part about installation, which the site's first page shows as well."""
    section = (ROOT / "README.md").read_text().partition("[start:install]")[2]
    return section.partition("[end:install]")[0]


@pytest.mark.parametrize("extra", sorted({*extras.EXTRAS.values(), "test"}))
def test_the_readme_says_what_an_extra_is_for(extra):
    assert f"| `[{extra}]` |" in install_section()


def test_the_readme_builds_where_a_clone_is_imported_from_and_warnings_say_the_same():
    """`make dist` follows these lines in fresh environments: tests/installed/clone.py."""
    lines = install_section().partition("```sh\n")[2].partition("```")[0].splitlines()
    assert lines[-1] == "pip install --no-build-isolation -e ."
    assert native.REMEDY.endswith(lines[-1])
