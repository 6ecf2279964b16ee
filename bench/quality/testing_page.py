"""The tables of docs/testing.md on coverage and mutants."""

from __future__ import annotations

from collections import Counter
from typing import Any


def coverage(results: dict[str, Any]) -> str:
    """Lines that tests run, per folder and in all."""
    lines = ["| lines that tests run | lines | run |", "|---|---|---|"]
    for language, folders in results["folders"].items():
        total = {key: sum(of[key] for of in folders.values()) for key in ("lines", "covered")}
        for name, of in {f"**{language}**": total, **folders}.items():
            label = name if name.startswith("**") else f"`{name}/`"
            lines.append(f"| {label} | {of['lines']:,} | {of['covered'] / of['lines']:.1%} |")
    lines += [
        "",
        f"torch {results['facts']['torch']}; commit {results['commit']}. From "
        "`bench/results/coverage.json`, made by `make coverage`.",
    ]
    return "\n".join(lines)


def mutants(results: dict[str, Any]) -> str:
    """Tabulate each module's mutants by their outcome, and list the survivors."""
    statuses = ("killed", "timeout", "survived", "no tests", "not checked")
    lines = [
        "| module | mutants | killed | by the time limit | survived | reached by no test "
        "| not run |",
        "|---|---|---|---|---|---|---|",
    ]
    total = [0] * len(statuses)
    for module, by_status in results["modules"].items():
        counts = [by_status.get(status, 0) for status in statuses]
        total = [a + b for a, b in zip(total, counts)]
        cells = " | ".join(map(str, counts))
        lines.append(f"| `{module}` | {sum(by_status.values())} | {cells} |")
    lines.append(f"| all | {sum(total)} | {' | '.join(map(str, total))} |")
    noticed = (total[0] + total[1]) / sum(total[:4])
    lines.append(
        f"\n{noticed:.1%} of those that were run are noticed. mutmut {results['mutmut']}, torch "
        f"{results['facts']['torch']}, commit {results['commit']}. From "
        "`bench/results/mutants.json`, made by `make mutants`. The others:\n"
    )
    lines += ["| module | was | is |", "|---|---|---|"]
    for s in results["survivors"]:
        was, now = (
            "<br>".join(f"`{line}`" for line in s[key]).replace("|", "\\|")
            for key in ("old", "new")
        )
        lines.append(f"| `{s['module']}` | {was} | {now} |")
    return "\n".join(lines)


# Columns of the table on mutants of PTX, by words in the machine's kinds of fault.
FOUND_BY = {
    "by value": ("value",),
    "race": ("race", "double write"),
    "bounds": ("out of bounds", "misaligned"),
    "not written": ("uninitialised", "unwritten", "never waited"),
    "waits in vain": ("deadlock", "for ever", "barrier"),
    "otherwise": ("",),
    "survived": ("survived",),
}


def ptx_mutants(results: dict[str, Any]) -> str:
    """Tabulate changes of PTX by what found them, and list the survivors."""
    numbers: dict[str, Counter[str]] = {}
    for target in results["targets"].values():
        for kinds in target["kernels"].values():
            for kind, of in kinds.items():
                counted = numbers.setdefault(kind, Counter())
                counted.update(places=of["places"], executed=of["reached"])
                for how, n in of["mutants"].items():
                    counted[column_of(how)] += n
    columns = ["places", "executed", *FOUND_BY]
    lines = [f"| change | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    total = sum(numbers.values(), Counter())
    for kind, counted in {**dict(sorted(numbers.items())), "all": total}.items():
        lines.append(f"| {kind} | {' | '.join(f'{counted[c]:,}' for c in columns)} |")
    n = sum(total[column] for column in FOUND_BY)
    lines += [
        "",
        f"{1 - total['survived'] / n:.1%} of {n} are found; {results['each']} of a kind for each "
        f"kernel and target, drawn by chance (seed {results['seed']}) from the places that small "
        f"cases execute. torch {results['facts']['torch']}, commit {results['commit']}. From "
        "`bench/results/ptx_mutants.json`, made by `make ptx-mutants`. The survivors, with an "
        "asterisk where some bits differ within the tolerance:",
        "",
        "| target | kernel | change | source | line | PTX |",
        "|---|---|---|---|---|---|",
    ]
    for found in results["targets"].values():
        for s in found["survivors"]:
            changed = s["kind"] if s["same_bits"] else f"{s['kind']} \\*"
            ptx = " ".join(s["ptx"].split()).replace("|", "\\|")
            cells = s["target"], s["kernel"], changed, s["source"], str(s["line"]), f"`{ptx}`"
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def column_of(how: str) -> str:
    """The column of one kind of fault.

    >>> column_of("shared race"), column_of("runs for ever"), column_of("error: KeyError")
    ('race', 'waits in vain', 'otherwise')
    """
    named = (column for column, words in FOUND_BY.items() if any(w and w in how for w in words))
    return next(named, "otherwise")
