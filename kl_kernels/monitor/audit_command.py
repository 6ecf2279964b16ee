"""`python -m kl_kernels audit`: check that a log is as it was written, and show its records."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kl_kernels.monitor.chain import Record, decode
from kl_kernels.monitor.verify import lines_of, verify_log

TEXT_WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser(
        "verify",
        help="whether a log is as it was written: exit code 0, or 1 and the first bad line",
        description="Check the hash chain of a log and the sidecar beside it. Exit code 1: the log "
        "is not as it was written.",
    )
    verify.add_argument(
        "--head", metavar="HASH", help="also require that the log has a record with this hash"
    )
    verify.add_argument("--json", action="store_true", help="print the verdict as a JSON object")
    show = actions.add_parser(
        "show",
        help="show one line per record, without checking the chain",
        description="Show a log's records: line, time, kind, step and data.",
    )
    show.add_argument("--kind", help="only records of this kind, such as event or update")
    for action in (verify, show):
        action.add_argument("file", type=Path, help="the log, such as audit.jsonl")


def run(args: argparse.Namespace) -> int:
    return _verify(args) if args.action == "verify" else _show(args)


def _verify(args: argparse.Namespace) -> int:
    verdict = verify_log(args.file, args.head)
    if args.json:
        print(json.dumps({"ok": verdict.ok, **asdict(verdict)}))
    elif verdict.ok:
        print(f"{args.file}: {verdict.message}; head {verdict.head}")
    else:
        print(f"{args.file}: {verdict.problem}: {verdict.message}")
    return 0 if verdict.ok else 1


def _show(args: argparse.Namespace) -> int:
    with suppress(BrokenPipeError):  # the reader has closed the pipe, as `| head` does
        _print_records(args)
    return 0


def _print_records(args: argparse.Namespace) -> None:
    with open(args.file, "rb") as file:
        for number, line in enumerate(lines_of(file), 1):
            record = decode(line)
            if record is None:
                if args.kind is None:
                    print(f"{number:>6}  not a record")
            elif args.kind in (None, record.kind):
                print(f"{number:>6}  {_row(record)}")


def _row(record: Record) -> str:
    data = dict(record.data)
    step = data.pop("step", "")
    # Printed as JSON: control characters in a log from elsewhere must not reach the terminal.
    text = "  ".join(f"{name}={_short(value)}" for name, value in _flat(data))
    if len(text) > TEXT_WIDTH:
        text = text[: TEXT_WIDTH - 3] + "..."
    time, kind = (json.dumps(word)[1:-1] for word in (record.time[:19], record.kind))
    return f"{time:19}  {kind:10}  {_short(step) if step != '' else '':>8}  {text}".rstrip()


def _flat(data: dict[str, Any]) -> list[tuple[str, Any]]:
    """Flatten nested dicts to names and values; the message of an event comes first."""
    pairs: list[tuple[str, Any]] = []
    for name, value in sorted(data.items(), key=lambda pair: (pair[0] != "message", pair[0])):
        pairs += _flat(value) if isinstance(value, dict) else [(json.dumps(name)[1:-1], value)]
    return pairs


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
