"""Results committed in bench/results can be shown: each picture is named in a block and drawn."""

import importlib
import json

import pytest

from kl_kernels.lab.documents import Picture, to_markdown


@pytest.mark.parametrize(
    ("name", "module"), [("offline", "bench.offline.measure"), ("growth", "bench.cpu.growth")]
)
def test_results_become_blocks_and_pictures(monkeypatch, request, name, module):
    bench = request.config.rootpath / "bench"
    monkeypatch.syspath_prepend(bench.parent)
    module = importlib.import_module(module)
    results = json.loads((bench / "results" / f"{name}.json").read_text())
    blocks, pictures = module.blocks(results), module.pictures(results)
    assert {b.name for b in blocks if isinstance(b, Picture)} == set(pictures)
    for svg in pictures.values():
        assert svg.startswith(b"<?xml")
    assert pictures == module.pictures(results)  # to the byte
    assert f"commit {results['commit']}" in to_markdown("Benchmarks", blocks, "benchmarks")
