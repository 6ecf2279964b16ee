"""Other packages' linear heads by the ledger: their products, and that all is called predicted."""

import json
from pathlib import Path

import pytest
import torch

from kl_kernels.lab.cost.jobs import Size
from kl_kernels.lab.documents import Table, to_markdown

BENCH = Path(__file__).parents[2] / "bench"
N, WIDTH, VOCAB = 512, 64, 4096


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))


# Products of N x WIDTH x VOCAB with a trained head, and with a frozen one.
PRODUCTS = {
    "torch eager": (3, 2),
    "torch linear_cross_entropy": (3, 2),
    "Liger fused linear cross-entropy": (3, 2),
    "verl linear_cross_entropy": (4, 4),
    "Cut Cross-Entropy": (4, 3),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_are_those_of_the_algorithm(bench, name):
    from bench.offline.head_calls import CALLS, Head
    from kl_kernels.lab.cost.prices import flops_by_dtype

    (call,) = [call for call in CALLS if call.name == name]
    for frozen, products in zip((False, True), PRODUCTS[name]):
        size = Size(N, WIDTH, VOCAB, torch.bfloat16, frozen, reference=False, masked=False)
        found = call.run(Head.of(size))
        assert set(found) == {"forward", "backward"}
        operations = [o for listed in found.values() for o in listed]
        assert flops_by_dtype(operations) == {"bfloat16": products * 2 * N * WIDTH * VOCAB}


def test_a_kernel_is_recorded_by_what_it_moves(bench):
    from bench.offline.head_calls import kernel
    from kl_kernels.lab.cost.ledger import Ledger

    tile = torch.empty(3, 5, dtype=torch.bfloat16, device="meta")
    with Ledger() as ledger:
        kernel("name", tile, tile, flops=7)
    (found,) = ledger.operations
    assert (found.op, found.bytes, found.flops, found.launches) == ("name", 60, 7, 1)


def test_the_page_calls_every_figure_predicted(bench):
    from bench.offline import heads

    results = json.loads((BENCH / "results" / "offline_heads.json").read_text())
    blocks = heads.blocks(results)
    text = to_markdown("", blocks, "benchmarks")
    assert "Nothing here was measured" in text
    assert text.splitlines()[0].endswith("predicted")
    tables = [block for block in blocks if isinstance(block, Table)]
    assert len(tables) == len(heads.SIZES)
    for table in tables:
        assert table.header[0] == "predicted"
        assert {f"**`{name}`**" for name in heads.OURS} <= {row[0] for row in table.rows}
    sizes = {(m["rows"], m["width"], m["vocab"]) for m in results["heads"]}
    assert sizes == set(heads.SIZES)
