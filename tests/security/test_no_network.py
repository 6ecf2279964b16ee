"""Importing the package, building it and its offline commands open no connection."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# The process ends at the first attempt: an exception could be caught by who makes it. Child
# processes have no hook, so the programs of network clients must not be started, either.
GUARD = """
import os, sys

def guard(event, args):
    network = ("socket.connect", "socket.getaddrinfo", "socket.gethostby", "socket.sendto",
               "socket.sendmsg", "socket.bind", "urllib.Request", "http.client.connect")
    clients = ("curl", "wget", "pip", "git", "ssh", "conda", "uv")
    started = str(args[0]).rpartition("/")[2] if event == "subprocess.Popen" else ""
    words = [str(word) for word in args[1]] if event == "subprocess.Popen" else []
    if event.startswith(network) or started in clients or {"pip", "ensurepip"} & set(words):
        os.write(2, f"NETWORK {event} {args}".encode())
        os._exit(99)

sys.addaudithook(guard)
"""

IMPORT_ALL = """
import importlib, json, pkgutil
import kl_kernels
names = [m.name for m in pkgutil.walk_packages(kl_kernels.__path__, "kl_kernels.")]
imported = []
for name in names:
    if "._C_" in name or name.endswith("__main__"):  # libraries of operators; the command
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # a trainer that is not installed
        if error.name.partition(".")[0] == "kl_kernels":
            raise
    else:
        imported.append(name)
print(json.dumps(imported))
"""

COMMAND = """
from kl_kernels.cli import main
sys.exit(main({arguments!r}))
"""

SETUP = """
import runpy
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARD + code], cwd=ROOT, capture_output=True, text=True
    )


def test_no_import_opens_a_connection():
    done = run(IMPORT_ALL)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout.splitlines()[-1])
    assert len(imported) > 80
    assert {"kl_kernels.lab.ppo.command", "kl_kernels.lab.study.command"} <= set(imported)


@pytest.mark.parametrize(
    "arguments", [["info"], ["validate", "--backend", "cpu", "--vocab-size", "2"]], ids=" ".join
)
def test_no_offline_command_opens_a_connection(arguments):
    done = run(COMMAND.format(arguments=arguments))
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_setup_opens_no_connection():
    done = run(SETUP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', '--version'])",
        "import socket, contextlib\n"
        "with contextlib.suppress(BaseException): socket.gethostbyname('localhost')",
    ],
)
def test_the_guard_sees(code):
    done = run(code)
    assert done.returncode == 99
    assert "NETWORK" in done.stderr
