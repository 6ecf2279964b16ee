"""The tables of docs/numerics.md, from the numerics report's summary."""

from __future__ import annotations

from typing import Any

from kl_kernels.lab.validate.report.table import markdown

DTYPES = ("float32", "bfloat16")
QUANTITIES = (
    "logprob",
    "kl",
    "forward_kl",
    "entropy",
    "jsd",
    "d logprob",
    "d kl",
    "d entropy",
    "d jsd",
)


def tables(results: dict[str, Any]) -> str:
    """Errors of backends and of eager over the report's grid, and of small KLs."""
    verdict = (
        f"{len(results['breaches'])} breaches of the gate"
        if results["breaches"]
        else "no breach of the gate"
    )
    return (
        "![errors of KL and entropy by KL, vocabulary and offset](numerics/numerics.png)\n\n"
        f"{markdown(results, DTYPES, QUANTITIES)}\n\n"
        f"{results['summary']['n_cells']} cells, {verdict}; {results['device']}, "
        f"torch {results['facts']['torch']}; commit {results['commit']}. From "
        "`bench/results/numerics.json`, made by `make numerics`."
    )
