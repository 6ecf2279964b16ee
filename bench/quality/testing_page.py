"""The tables of docs/testing.md on coverage and mutants."""

from __future__ import annotations

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
