"""The command line: each command is a module with `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from kl_kernels.text import printable

COMMANDS = {
    "ppo": ("kl_kernels.ppo.command", "train a language model with PPO through the fused ops"),
    "study": ("kl_kernels.study.command", "PPO over many beta and seeds: what the KL penalty does"),
    "validate": ("kl_kernels.validate.command", "check every backend here against float64"),
    "bench": ("kl_kernels.bench", "measure the ops beside other packages (needs a checkout)"),
    "codegen": ("kl_kernels.codegen.command", "compile the Triton kernels, count, predict times"),
    "audit": ("kl_kernels.monitor.audit_command", "check an audit log, or show its records"),
    "info": ("kl_kernels.info", "versions, devices, backends and why the others are not there"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a bad argument is one sentence on stderr and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m kl_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    wanted = argv[0] if argv else None
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        if name == wanted:  # the others' imports are not worth waiting for
            importlib.import_module(module).add_arguments(command)
    args = parser.parse_args(argv)
    try:
        return int(importlib.import_module(COMMANDS[args.command][0]).run(args))
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
