"""Ends of a command: without a message where its reader leaves or Ctrl-C is pressed."""

import os
import signal
import subprocess
import sys

import pytest

# A process that imports `module` reports it and then sleeps.
STOPS = """
import sys, time

class Stops:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == {module!r} and path is None:
            print("here", flush=True)
            time.sleep(600)

sys.meta_path.insert(0, Stops)
"""


def shell(command):
    return subprocess.run(
        ["bash", "-c", command.replace("KL", f"{sys.executable} -m kl_kernels")],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", ["info", "ppo --help"])
def test_a_reader_that_leaves_is_no_error(arguments, unbuffered):
    for reader in ("head -n 1", "true"):
        done = shell(
            f"PYTHONUNBUFFERED={unbuffered} KL {arguments} | {reader}; echo ${{PIPESTATUS[0]}}"
        )
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1] == "0"


def test_a_verdict_that_nobody_could_read_is_not_told_as_a_success():
    """Unbuffered, the first line finds the pipe closed: nothing has been checked by then."""
    done = shell(
        "PYTHONUNBUFFERED=1 KL validate --quick --backend cpu | true; echo ${PIPESTATUS[0]}"
    )
    assert done.stderr == ""
    assert done.stdout == "141\n"


def interrupted(tmp_path, module, *command):
    """Ctrl-C while `module` is imported: the exit code, what was printed, and stderr."""
    (tmp_path / "sitecustomize.py").write_text(STOPS.format(module=module))
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ | {"PYTHONPATH": path.rstrip(os.pathsep)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Ignored in what a shell runs in the background, tests included.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.mark.parametrize(
    "module",
    [
        pytest.param("torch", id="while the package is imported"),
        pytest.param("transformers", id="while the command is"),
    ],
)
def test_ctrl_c_is_no_error_to_be_explained(tmp_path, module):
    assert interrupted(tmp_path, module, "-m", "kl_kernels", "ppo") == (130, "", "")


def test_whoever_imports_the_package_keeps_their_own_ctrl_c(tmp_path):
    code, _, err = interrupted(tmp_path, "torch", "-c", "import kl_kernels")
    assert code == -signal.SIGINT
    assert "KeyboardInterrupt" in err
    program = "import signal; before = signal.getsignal(signal.SIGINT); import kl_kernels; "
    program += "assert signal.getsignal(signal.SIGINT) is before"
    subprocess.run([sys.executable, "-c", program], check=True)
