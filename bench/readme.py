"""Renders the committed results files into README.md and docs/, between their markers.

python -m bench.readme          # rewrite them
python -m bench.readme --check  # exit 1 if one is not what the files say
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import report
from bench.cpu import linear_page
from bench.cpu import page as cpu_page
from bench.gpu import page as gpu_page
from bench.peers import page as peers_page
from bench.quality import monitoring_page, numerics_page, testing_page
from kl_kernels.lab.documents import Text, to_markdown
from kl_kernels.lab.study.outcomes import WINDOW
from kl_kernels.lab.study.plan import ADAPTIVE
from kl_kernels.lab.study.report import TITLE, contents
from kl_kernels.lab.study.statistics import Interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def beta_table(results: dict[str, Any]) -> str:
    """KL and gold score that each beta of the study ended with."""
    lines = [
        "| beta [sd of scores per nat] | KL [nats per answer] | gold score | lost from its peak |",
        "|---|---|---|---|",
    ]
    for name, row in results["table"].items():
        cells = " | ".join(str(Interval(**row[c])) for c in ("kl", "gold", "gold_drop"))
        label = f"adaptive, target {results['kl_target']:g}" if name == ADAPTIVE else name
        lines.append(f"| {label} | {cells} |")
    start = Interval(**results["start"]["gold"])
    lines.append(
        f"\nGold before training: {start}. Means over the last {WINDOW} of {results['updates']} "
        f"updates and over {results['n_seeds']} seed(s); commit {results['commit']}. From "
        "`bench/results/study.json`, made by `make bench-study`."
    )
    return "\n".join(lines)


def study_document(results: dict[str, Any]) -> str:
    """The study's report, without what is drawn in pictures."""
    made = (
        f"{results['device']}, {results['cores']} cores; torch {results['facts']['torch']}; commit "
        f"{results['commit']}. From `bench/results/study.json`, made by `make bench-study`."
    )
    return to_markdown(TITLE, [*contents(results), Text(made)], "study")


def traffic_sentence(results: dict[str, Any]) -> str:
    """Tensors of logits through memory, in one visit and in two."""
    one, two = results["tensors"]["one visit"], results["tensors"]["two visits"]
    return (
        f"A policy loss with an exact KL reads {one['read']:.2f} tensors of logits and writes "
        f"{one['written']:.2f} (in two visits: {two['read']:.2f} and {two['written']:.2f}), "
        f"counted by cachegrind behind a cache of {results['cache_bytes'] >> 20} MiB at V = "
        f"{results['vocab_size']}, bfloat16; commit {results['commit']}. From "
        "`bench/results/traffic.json`, made by `make bench-traffic`."
    )


def gpu_section(results: dict[str, Any]) -> str:
    """A line for each job, then everything that was measured."""
    return f"{gpu_page.short_table(results)}\n\n{report.section('gpu_h200', results)}"


TRAINERS = {"trl": "TRL", "verl": "verl", "openrlhf": "OpenRLHF", "liger-kernel": "Liger"}


def compatibility_tables(results: dict[str, Any]) -> str:
    """Tabulate the tests of each version of a trainer, newest first, and the packages beside it."""
    records = sorted(
        results.values(),
        key=lambda r: (
            list(TRAINERS).index(r["trainer"]),
            [-int(n) for n in re.findall(r"\d+", r["version"])],
        ),
    )
    lines = ["| trainer | version | tests | beside |", "|---|---|---|---|"]
    for r in records:
        beside = ", ".join(f"{name} {version}" for name, version in r["packages"].items())
        n_tests = sum(r["exercised"].values())
        lines.append(f"| {TRAINERS[r['trainer']]} | {r['version']} | {n_tests} | {beside} |")
    for r in records:
        lines += ["", f"## {TRAINERS[r['trainer']]} {r['version']}", ""]
        lines += ["| what was run | tests |", "|---|---|"]
        lines += [f"| {what} | {n} |" for what, n in r["exercised"].items()]
    lines += ["", "From `bench/results/compatibility.json`, made by `make integrations`."]
    return "\n".join(lines)


NOT_MEASURED = "Not measured yet."
Sections = dict[str, Callable[[dict[str, Any]], str]]

DOCUMENTS: dict[str, Sections] = {
    "README.md": {
        "peers": peers_page.short_table,
        "cpu": cpu_page.sentence,
        "linear": linear_page.short_table,
    },
    "docs/numerics.md": {"numerics": numerics_page.tables},
    "docs/monitoring.md": {
        "monitor": monitoring_page.noise_and_changes,
        "sampling_gap": monitoring_page.sampling_gap,
    },
    "docs/study.md": {"study": study_document},
    "docs/concepts/beta.md": {"study": beta_table},
    "docs/testing.md": {
        "coverage": testing_page.coverage,
        "mutants": testing_page.mutants,
        "ptx_mutants": testing_page.ptx_mutants,
    },
    "docs/how-to/compatibility.md": {"compatibility": compatibility_tables},
    "docs/benchmarks.md": {
        **{name: partial(report.section, name) for name in report.MODULES},
        "gpu_h200": gpu_section,
        "cpu": cpu_page.tables,
        "traffic": traffic_sentence,
    },
}


def rendered(path: str, text: str) -> str:
    """The document with every section as the results files have it."""
    for name, render in DOCUMENTS[path].items():
        begin, end = f"<!-- results: {name} -->", f"<!-- end of {name} -->"
        results = RESULTS / f"{name}.json"
        figures = render(json.loads(results.read_text())) if results.exists() else NOT_MEASURED
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{path} has no section between {begin!r} and {end!r}")
        section = f"{begin}\n{figures}\n{end}"
        text = pattern.sub(section.replace("\\", r"\\"), text)
    return text


def main() -> int:
    check = "--check" in sys.argv[1:]
    differ = False
    for path in DOCUMENTS:
        before = (ROOT / path).read_text()
        after = rendered(path, before)
        differ |= before != after
        if not check:
            (ROOT / path).write_text(after)
    if not check:
        report.draw()
        report.PAGE.write_text(report.page())
        return 0
    if stale := report.stale_pictures():
        print(f"not drawn from the committed results: {', '.join(stale)}")
        return 1
    return int(differ or report.PAGE.read_text() != report.page())


if __name__ == "__main__":
    sys.exit(main())
