"""The page about what kernels execute and ask of memory, as tests/machine/executed.py counts it."""

from __future__ import annotations

from typing import Any

from kl_kernels.lab.documents import Block, Heading, Table, Text

Row = dict[str, Any]
ALIGNED, UNALIGNED = 50304, 50257  # vocabularies that are compared


def pictures(results: dict[str, Any]) -> dict[str, bytes]:
    return {}


def blocks(results: dict[str, Any]) -> list[Block]:
    return [
        Heading("What kernels execute, counted while their PTX runs"),
        Text(
            "The GPU backends' kernels run on the CPU, instruction by instruction, on a few rows "
            "and with a GPU's launch sizes (`tests/machine/`). These are PTX instructions as the "
            "compilers emit them, not SASS, of which ptxas makes fewer; each is counted for all 32 "
            "threads of a warp, and with all work around the loops. **Sectors**: of 32 bytes, that "
            "a warp's request touches; a request of 512 bytes fills 16 of them. **Sector bytes**: "
            "bytes in the sectors of all requests, which L1 answers or asks the L2 for. "
            "**Conflicts**: more passes over shared memory than its bytes need, per request. "
            "**Folded again**: share of the logits read by the careful loop after the fast one; "
            "blank where the fast loop is unrolled away or there is none."
        ),
        Text(findings(results)),
        Text(
            "A CUDA lane owns eight logits however they are aligned: where it reads them in words, "
            "or sixteen bytes of float32 at a time, one request has a part of each sector, and the "
            "next ones the rest, from L1."
        ),
        table([row for row in results["kernels"] if row["unit"] != "thread"]),
        Text(
            f"Triton {results['triton']}, nvcc {results['nvcc']}; commit {results['commit']}. From "
            "`bench/results/executed.json`, made by `make counters`."
        ),
    ]


def findings(results: dict[str, Any]) -> str:
    """The figures that rows of an odd vocabulary cost, and those of the policy loss."""
    rows = results["kernels"]
    said = []
    for backend, name in (("triton", "Triton"), ("cuda", "CUDA")):
        forward, backward, loss = (
            [one(rows, job, backend, vocab_size) for vocab_size in (ALIGNED, UNALIGNED)]
            for job in ("forward, reference", "backward, reference", "policy loss, reference")
        )
        reads, writes = (
            [
                f"{row[access]['bytes']:.0f} bytes in {row[access]['sectors']:.1f} sectors"
                for row in pair
            ]
            for access, pair in (("global load", forward), ("global store", backward))
        )
        moved = [f"{row['global load']['sector_bytes_per_unit']:.1f}" for row in forward]
        executed = [f"{row['instructions']:.1f}" for row in loss]
        conflicts = [f"{row['shared load']['conflicts']:.2f}" for row in loss]
        said.append(
            f"{name}: a request of the forward pass reads {reads[0]}, of unaligned rows "
            f"{reads[1]} ({moved[0]} and {moved[1]} sector bytes per pair of bfloat16, which has "
            f"4); one of the gradient writes {writes[0]}, of unaligned rows {writes[1]}. The "
            f"policy loss executes {executed[0]} instructions per pair, of unaligned rows "
            f"{executed[1]}, with {conflicts[0]} and {conflicts[1]} conflicts per read of "
            "shared memory."
        )
    return f"V = {ALIGNED} and, unaligned, {UNALIGNED}, bfloat16, sm_90. " + " ".join(said)


def one(rows: list[Row], job: str, backend: str, vocab_size: int) -> Row:
    """The kernel over logits of a job in bfloat16 on sm_90."""
    (found,) = (
        row
        for row in rows
        if (row["job"], row["backend"], row["vocab_size"]) == (job, backend, vocab_size)
        and (row["arch"], row["dtype"]) == ("sm_90", "bfloat16")
        and row["unit"] != "thread"
    )
    return found


def table(rows: list[Row]) -> Table:
    header = (
        "backend", "job", "kernel", "rows", "per", "instructions", "in loops", "folded again",
        "load: bytes", "sectors", "sector bytes", "store: bytes", "sectors", "sector bytes",
        "conflicts",
    )  # fmt: skip
    return Table(header, [cells(row) for row in rows])


def cells(row: Row) -> tuple[str, ...]:
    load, store = row["global load"], row["global store"]
    writes_rows = store["sector_bytes_per_unit"] > 1
    read = row["read_in"]
    return (
        f"{row['backend']}, {row['arch']}",
        row["job"],
        row["kernel"],
        f"{row['dtype']}, {row['vocab_size']}",
        row["unit"],
        f"{row['instructions']:.1f}",
        f"{row['in_loops']:.1f}",
        f"{min(1.0, read['careful'] / read['fast']):.0%}" if read.get("fast") else "",
        f"{load['bytes']:.0f}",
        f"{load['sectors']:.1f}",
        f"{load['sector_bytes_per_unit']:.1f}",
        *((f"{store['bytes']:.0f}", f"{store['sectors']:.1f}") if writes_rows else ("", "")),
        f"{store['sector_bytes_per_unit']:.1f}" if writes_rows else "",
        f"{row['shared load']['conflicts']:.2f}",
    )
