"""`python -m kl_kernels`: each command is a module with `add_arguments(parser)` and `run(args)`.

A command's --help imports its module, so modules import no package of an extra; `run` imports what
a run needs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from kl_kernels import __version__
from kl_kernels.text import printable

COMMANDS = {
    "ppo": ("lab.ppo.arguments", "train a language model with PPO and a KL penalty"),
    "study": ("lab.study.arguments", "run PPO with many KL penalties and seeds, and report"),
    "validate": ("lab.validate.command", "check every available backend against float64"),
    "bench": ("lab.bench", "measure speed beside other packages (in a checkout)"),
    "codegen": (
        "lab.codegen.command",
        "compile the Triton kernels, count instructions, predict times; no GPU is needed",
    ),
    "cost": (
        "lab.cost.command",
        "list and price what a function runs on a GPU; no GPU is needed",
    ),
    "audit": ("monitor.audit_command", "verify an audit log, or show its records"),
    "info": ("info", "show versions, devices and which backends are available"),
}
# A shell's exit code for a process that a signal ended: 128 and the signal's number.
INTERRUPTED = 130
CLOSED_PIPE = 141


class Parser(argparse.ArgumentParser):
    """A parser that accepts options by their full names alone, as do its commands' parsers."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; a bad argument is one sentence on stderr and exit code 2.

    A closed output pipe (`| head`) and Ctrl-C end the command without a message.
    """
    code = CLOSED_PIPE
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()  # Python would do so at its end, and complain of a closed pipe
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return INTERRUPTED
    return code


def _run(argv: list[str]) -> int:
    wanted = argv[0] if argv else None
    parser = Parser(
        prog="python -m kl_kernels",
        description="Fused kernels for RLHF: the commands that try, check and measure them.",
        epilog="python -m kl_kernels COMMAND --help has a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"kl_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=f"{_sentence(summary)}.")
        if name == wanted:  # the others' imports are not worth waiting for
            _module(module).add_arguments(command)
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:  # raised after --help, --version and refused arguments
        return int(end.code or 0)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        return int(_module(COMMANDS[args.command][0]).run(args))
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2


def _module(name: str) -> Any:
    return importlib.import_module(f"kl_kernels.{name}")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]
