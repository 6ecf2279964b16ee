"""The benchmark page: committed results files as docs/benchmarks.md, its pictures, and one HTML.

Each results file has a module with `blocks(results)`, the page's text and tables, and
`pictures(results)`, SVGs by name. A picture carries the digest of the file it was drawn from, so
that a stale one is found without drawing it again (matplotlib's versions differ in details).
"""

from __future__ import annotations

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

from kl_kernels.lab.documents import Block, Picture, to_html, to_markdown

ROOT = Path(__file__).parents[2]
RESULTS, PICTURES = ROOT / "bench" / "results", ROOT / "docs" / "benchmarks"
PAGE = PICTURES / "index.html"
TITLE = "kl_kernels: benchmarks"
MODULES = {  # by results file, in the order of the page
    "gpu_h200": "bench.gpu.page",
    "heads_h200": "bench.gpu.heads",
    "peers_h200": "bench.peers.page",
    "peers": "bench.peers.page",
    "linear": "bench.cpu.linear_page",
    "offline": "bench.offline.measure",
    "executed": "bench.offline.executed",
    "offline_heads": "bench.offline.heads",
    "growth": "bench.cpu.growth",
}


def parts() -> dict[str, str]:
    """Modules by results file, of those that are there."""
    return {n: module for n, module in MODULES.items() if (RESULTS / f"{n}.json").exists()}


def section(name: str, results: dict[str, Any]) -> str:
    """A results file's part of docs/benchmarks.md."""
    text = to_markdown("", blocks(name, results), "benchmarks", suffix=".svg")
    return text.rstrip("\n")


def blocks(name: str, results: dict[str, Any]) -> list[Block]:
    return importlib.import_module(parts()[name]).blocks(results)


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def draw() -> None:
    """Every picture anew."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    for name, module in parts().items():
        for picture, svg in importlib.import_module(module).pictures(read(name)).items():
            marked = svg.rstrip() + mark(name).encode() + b"\n"
            (PICTURES / f"{picture}.svg").write_bytes(marked)


def mark(name: str) -> str:
    digest = hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest()[:16]
    return f"\n<!-- {name}.json {digest} -->"


def stale_pictures() -> list[str]:
    """Pictures on the page that are not there or not drawn from the committed results."""
    return [
        block.name
        for name in parts()
        for block in blocks(name, read(name))
        if isinstance(block, Picture) and mark(name) not in _text(PICTURES / f"{block.name}.svg")
    ]


def page() -> str:
    """The page as one HTML file, with the committed pictures inside."""
    everything = [block for name in parts() for block in blocks(name, read(name))]
    svgs = {
        block.name: (PICTURES / f"{block.name}.svg").read_bytes()
        for block in everything
        if isinstance(block, Picture)
    }
    return to_html(TITLE, everything, svgs)


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""
