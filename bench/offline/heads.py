"""Linear heads of ours and of other packages on a GPU, priced without one: all is predicted.

python -m bench.offline.heads  # part of `make bench-offline`

The operations of each are counted on tensors without data, forward and backward, and priced as
`python -m kl_kernels cost` prices ours.
"""

from __future__ import annotations

import argparse
import json
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.common.machine import record
from kl_kernels.lab.documents import Block, Bullets, Heading, Table, Text

RESULTS = Path(__file__).parents[1] / "results" / "offline_heads.json"
CHIP, DTYPE = "h200", "bfloat16"
SIZES = ((8192, 4096, 128256), (8192, 896, 151936))  # rows, width, vocabulary
OURS = {  # and the numbers they compute
    "linear_policy_loss": "PPO's or GRPO's loss",
    "linear_token_stats": "log-probability and entropy",
}
Results = dict[str, Any]
Row = dict[str, Any]


def pictures(results: Results) -> dict[str, bytes]:
    return {}


def blocks(results: Results) -> list[Block]:
    chip = results["chip"].upper()
    found: list[Block] = [
        Heading(f"Linear heads on an {chip}, predicted"),
        Text(
            f"**Nothing here was measured.** Operations of a forward and a backward pass in "
            f"{results['dtype']} are counted on tensors without data and priced at the rates that "
            "`python -m kl_kernels cost` takes: large matrix products at 80 % of the data sheet's "
            "rate, copies at 90 %. **Products**: matrix products of rows x width x vocabulary, by "
            "the dtype of their factors. Kernels of others that multiply matrices themselves are "
            "priced at the rate of library products, which favours them, and without waiting for "
            "locks. What a package computes differs: a loss that is known when the logits are "
            "multiplied needs no second product for them."
        ),
    ]
    for rows, width, vocab in {(m["rows"], m["width"], m["vocab"]): None for m in results["heads"]}:
        at = [m for m in results["heads"] if (m["width"], m["vocab"]) == (width, vocab)]
        found += [Text(f"**{rows} rows x {vocab} logits x width {width}**, predicted:"), table(at)]
    if results["left_out"]:
        found += [
            Text("Not priced:"),
            Bullets([f"{name}: {why}" for name, why in results["left_out"].items()]),
        ]
    versions = ", ".join(f"{name} {v}" for name, v in results["packages"].items())
    return [
        *found,
        Text(
            f"{versions}; commit {results['commit']}. From `bench/results/offline_heads.json`, "
            "made by `make bench-offline`."
        ),
    ]


def table(rows: list[Row]) -> Table:
    trained, frozen = ({m["name"]: m for m in rows if m["frozen"] == f} for f in (False, True))
    best = trained["linear_policy_loss"], frozen["linear_policy_loss"]
    header = (
        "predicted", "computes", "products", "forward ms", "backward ms", "both ms",
        "x linear_policy_loss", "frozen head: products", "both ms", "x linear_policy_loss",
    )  # fmt: skip
    lines = []
    for name, m in sorted(trained.items(), key=lambda item: item[1]["predicted_ms"]):
        f = frozen[name]
        lines.append(
            (
                f"**`{name}`**" if name in OURS else name,
                m["computes"],
                products(m),
                f"{m['forward_ms']:.1f}",
                f"{m['backward_ms']:.1f}",
                f"{m['predicted_ms']:.1f}",
                f"{m['predicted_ms'] / best[0]['predicted_ms']:.2f}",
                products(f),
                f"{f['predicted_ms']:.1f}",
                f"{f['predicted_ms'] / best[1]['predicted_ms']:.2f}",
            )
        )
    return Table(header, lines)


def products(m: Row) -> str:
    return ", ".join(f"{n:.0f} {dtype}" for dtype, n in m["products"].items())


def priced(name: str, size: Any, computes: str, found: Row) -> Row:
    """A line of the results file, of what `cost` found or the same of another package."""
    unit = 2 * size.rows * size.width * size.vocab
    return {
        "name": name,
        "computes": computes,
        "rows": size.rows,
        "width": size.width,
        "vocab": size.vocab,
        "frozen": size.frozen_head,
        "products": {d: n / unit for d, n in found["gemm_flops_by_operand_dtype"].items()},
        **{key: found[key] for key in ("forward_ms", "backward_ms", "predicted_ms")},
    }


def heads() -> tuple[list[Row], dict[str, str]]:
    """Every head at every size, ours first; and who could not be priced, and why."""
    import torch

    from bench.offline.head_calls import CALLS, Head
    from kl_kernels.lab.cost.command import cost, summary
    from kl_kernels.lab.cost.jobs import Size
    from kl_kernels.lab.cost.prices import rates

    rows, left_out = [], {}
    for n, width, vocab in SIZES:
        for frozen in (False, True):
            size = Size(
                n, width, vocab, getattr(torch, DTYPE), frozen, reference=False, masked=False
            )
            rows += [
                priced(name, size, what, cost(name, size, CHIP)) for name, what in OURS.items()
            ]
            for call in CALLS:
                try:
                    found = summary(call.run(Head.of(size)), rates(CHIP))
                except ImportError as error:
                    left_out[call.name] = str(error)
                    continue
                rows.append(priced(call.name, size, call.computes, found))
    return rows, left_out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # libraries warn about what this machine lacks
    rows, left_out = heads()
    from bench.offline.head_calls import CALLS

    results = record() | {
        "chip": CHIP,
        "dtype": DTYPE,
        "packages": {
            call.package: metadata.version(call.package)
            for call in CALLS
            if call.name not in left_out
        },
        "heads": rows,
        "left_out": left_out,
    }
    for m in rows:
        print(
            f"{m['name']:34}{m['width']:6}{m['vocab']:8}{' frozen' if m['frozen'] else '':8}"
            f"{products(m):24}{m['forward_ms']:8.1f}{m['backward_ms']:8.1f}{m['predicted_ms']:8.1f}"
            " ms, predicted"
        )
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
