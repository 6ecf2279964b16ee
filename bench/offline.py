"""Instructions per logit of this package's Triton kernels beside other libraries', without a GPU.

Every kernel is compiled for sm_90 as its own library launches it for logits of 8192 x 128256 in
bfloat16, and its machine code is counted as `python -m kl_kernels codegen` counts ours. The least
time on an H200 is what `kl_kernels/codegen/chips.py` predicts from these counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import triton
from machine import record
from offline_figures import instructions, least_times
from offline_launches import Launch, recorded
from offline_peers import BACKWARD, CALLS, KL, LEFT_OUT, LOGPROB, ROWS, VOCAB_SIZE, Counted, version

from kl_kernels.codegen import sass
from kl_kernels.codegen.chips import CHIPS, Chip, limits, occupancy, second_look_hits
from kl_kernels.codegen.compile import compile_for, compile_kernel, disassemble, empty_cache
from kl_kernels.codegen.sass import Kernel, Loop
from kl_kernels.codegen.variants import Shape, variants
from kl_kernels.study.document import Block, Bullets, Heading, Picture, Table, Text

ARCH, CHIP = "sm_90", "h200"
OURS = "kl_kernels"
WARP = 32
SPILLS = ("LDL", "STL")

# What is beside what, in the order of tables and pictures.
JOBS = {
    LOGPROB: "one pass over the policy's logits: log-probability and what comes with it",
    KL: "policy and reference: an exact KL",
    BACKWARD: "with the gradient of the logits",
}


@dataclass(frozen=True)
class OurKernel:
    """Of the variants that codegen compiles: the loops that run on ordinary logits."""

    variant: str
    job: str
    computes: str
    loops: tuple[str, ...]
    unit_bytes: int


OUR_KERNELS = [
    OurKernel("fold: policy", LOGPROB, "log-probability, entropy", ("fast",), 2),
    OurKernel("fold: policy and reference", KL, "both KLs, both log-probabilities, entropy",
              ("fast",), 4),
    OurKernel("backward: no KL", BACKWARD, "of log-probability and entropy", ("tiles",), 2),
    OurKernel("backward: KL", BACKWARD, "of log-probability, reverse KL, entropy", ("tiles",), 4),
    OurKernel("policy loss: policy", BACKWARD, "policy loss with entropy, and its gradient",
              ("fast", "gradient"), 2),
    OurKernel("policy loss: policy and reference", BACKWARD,
              "policy loss with entropy and exact KL, and its gradient", ("fast", "gradient"), 4),
]  # fmt: skip


def our_rows() -> list[dict[str, Any]]:
    by_name = {variant.name: variant for variant in variants(Shape(ROWS, VOCAB_SIZE))}
    rows = []
    for ours in OUR_KERNELS:
        variant = by_name[ours.variant]
        kernel, files = compile_for(ARCH, variant)
        loops = {name: kernel.loops[name] for name in ours.loops}
        about = {
            "name": ours.variant, "library": OURS, "job": ours.job, "computes": ours.computes,
            "unit": variant.unit, "notes": "", "launch": f"{kernel.num_warps} warps",
        }  # fmt: skip
        spills = spill_instructions(files["sass"].decode())
        rows.append(about | figures(kernel, loops, ours.unit_bytes, spills, from_the_end=True))
    return rows


def peer_rows() -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each kernel, and what could not be compiled with its reason."""
    rows, failed = [], dict(LEFT_OUT)
    for call in CALLS:
        try:
            launches = recorded(call.make, meta=call.meta)
            about = {"library": f"{call.library} {version(call.library)}"}
        except (ImportError, PackageNotFoundError) as error:
            failed[f"{call.library}: {call.make.__name__}"] = str(error)
            continue
        for kernel_name, counted in call.kernels.items():
            tried = distinct([launch for launch in launches if launch.name == kernel_name])
            found = [about | peer_row(launch, counted) for launch in tried]
            rows.append(min(found, key=lambda row: (row["least_ms"], row["instructions"])))
            if len(tried) > 1:
                rows[-1]["notes"] = f"the best of the {len(tried)} tiles its autotuner tries"
            print(shown(rows[-1]), flush=True)
    return rows, failed


def distinct(launches: list[Launch]) -> list[Launch]:
    """Without repetitions; a number of stages matters to loops with matrix products alone."""
    kept: dict[str, Launch] = {}
    for launch in launches:
        constants = {n: v for n, v in launch.arguments.items() if isinstance(v, (int, float, str))}
        kept.setdefault(f"{constants} {launch.options.get('num_warps')}", launch)
        if not launch.tuned:
            break
    return list(kept.values())


def peer_row(launch: Launch, counted: Counted) -> dict[str, Any]:
    kernel, loops, spills = count(launch, counted.loops, counted.block, counted.unit_bytes)
    about = {
        "name": counted.name, "job": counted.job, "computes": counted.computes,
        "unit": counted.unit, "notes": counted.notes,
        "launch": f"tile of {launch.arguments[counted.block]}, {kernel.num_warps} warps",
    }  # fmt: skip
    return about | figures(kernel, loops, counted.unit_bytes, spills, from_the_end=False)


def count(
    launch: Launch, names: tuple[str, ...], block: str, unit_bytes: int
) -> tuple[Kernel, dict[str, Loop], int]:
    """A foreign kernel, its loops over the vocabulary by name, and its instructions that spill.

    RuntimeError: the code has not these loops, or one reads something else than logits.
    """
    compiled = compile_kernel(ARCH, launch.kernel, launch.arguments | launch.options)
    listing = disassemble(compiled.asm["cubin"])
    registers, stack = sass.usage(listing)
    num_warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    units = max(1, launch.arguments[block] // (WARP * num_warps))
    found = sass.loops(listing, units) if names else [sass.program(listing, units)]
    if len(found) != max(1, len(names)):
        raise RuntimeError(f"{launch.name} has {len(found)} loops that read memory, not {names}")
    loops = dict(zip(names, (per_logit(loop, unit_bytes) for loop in found))) or {
        "whole program": without_row_loads(found[0], unit_bytes)
    }
    kernel = Kernel(launch.name, registers, stack, shared, num_warps, loops)
    return kernel, loops, spill_instructions(listing)


def per_logit(loop: Loop, unit_bytes: int) -> Loop:
    """With the units that its loads make out: the compiler may have unrolled it."""
    times = loop.read / unit_bytes
    if times != int(times) or times < 1:
        raise RuntimeError(f"a loop reads {loop.read:g} bytes per tile's unit, not {unit_bytes}")
    return Loop(loop.opcodes, loop.units * int(times))


def without_row_loads(program: Loop, unit_bytes: int) -> Loop:
    """What a program reads once for its whole row costs instructions, but no memory to speak of.

    Logits are what is read by the widest loads. RuntimeError: these read more or less than a tile.
    """
    wide = f".{8 * program.widest_load}" if program.widest_load > 4 else ""
    opcodes: Counter[str] = Counter()
    for opcode, n in program.opcodes.items():
        of_row = opcode.startswith("LDG.") and wide not in opcode
        opcodes[f"ROW.{opcode}" if of_row else opcode] += n
    rest = Loop(opcodes, program.units)
    if rest.read != unit_bytes:
        raise RuntimeError(f"a program reads {rest.read:g} bytes per logit or pair: {opcodes}")
    return rest


def spill_instructions(listing: str) -> int:
    return sum(sass.program(listing, 1).count(opcode) for opcode in SPILLS)


def figures(
    kernel: Kernel, loops: dict[str, Loop], unit_bytes: int, spills: int, *, from_the_end: bool
) -> dict[str, Any]:
    """Per unit, a logit or a pair: sums over the loops, each of which goes over all of them."""
    chip = CHIPS[CHIP]
    hits = second_look(kernel, unit_bytes, chip, from_the_end) if len(loops) > 1 else 0.0
    times = least(list(loops.values()), hits, chip)
    each = [
        {
            "name": name, "instructions": loop.instructions, "mufu": loop.mufu,
            "loads": loop.count("LDG.") / loop.units, "load_bytes": loop.load_width,
            "read": loop.read, "written": loop.bytes - loop.read,
            "barriers": loop.barriers, "shuffles": loop.shuffles, "units": loop.units,
        }
        for name, loop in loops.items()
    ]  # fmt: skip
    return {
        "registers": kernel.registers, "stack": kernel.stack, "spills": spills,
        "shared": kernel.shared, "num_warps": kernel.num_warps,
        "occupancy": occupancy(kernel.registers, kernel.shared, kernel.num_warps, chip),
        "instructions": sum(loop["instructions"] for loop in each),
        "mufu": sum(loop["mufu"] for loop in each),
        "reads": sum(loop["read"] for loop in each) / unit_bytes,
        "written": sum(loop["written"] for loop in each),
        "l2_hits": hits, "limits_ms": {name: 1e3 * s for name, s in times.items()},
        "least_ms": 1e3 * max(times.values()), "bound_by": max(times, key=times.__getitem__),
        "loops": each,
    }  # fmt: skip


def second_look(kernel: Kernel, unit_bytes: int, chip: Chip, from_the_end: bool) -> float:
    """The share of a second look that the L2 still holds: some of it if that starts at the end.

    If it starts at the beginning again, which was let go first, then all or nothing.
    """
    resident = chip.warps * occupancy(kernel.registers, kernel.shared, kernel.num_warps, chip)
    in_flight = chip.sms * round(resident / kernel.num_warps)
    hits = second_look_hits(VOCAB_SIZE * unit_bytes, in_flight, chip)
    return hits if from_the_end else float(hits == 1.0)


def least(loops: list[Loop], hits: float, chip: Chip) -> dict[str, float]:
    """Seconds that each resource needs for all loops; `hits` of a second look cost no memory."""
    units = ROWS * VOCAB_SIZE
    times = dict.fromkeys(limits(loops[0], units, chip), 0.0)
    for i, loop in enumerate(loops):
        for name, seconds in limits(loop, units, chip).items():
            times[name] += seconds
        times["memory"] -= units * hits * loop.read / chip.bandwidth if i else 0.0
    return times


def shown(row: dict[str, Any]) -> str:
    return (
        f"{row['job']:16}{row['name']:34}{row['instructions']:7.1f}{row['mufu']:6.2f} MUFU "
        f"{row['reads']:5.2f} reads {row['registers']:4} registers {row['stack']:5} stack "
        f"{row['least_ms']:6.2f} ms, {row['bound_by']}"
    )


def pictures(results: dict[str, Any]) -> dict[str, bytes]:
    """SVG, by name."""
    return {
        "offline_instructions": instructions(results),
        "offline_least_times": least_times(results),
    }


def blocks(results: dict[str, Any]) -> list[Block]:
    shape = f"{results['rows']} x {results['vocab_size']}"
    return [
        Heading("Machine code, counted without a GPU"),
        Text(
            "Every kernel is compiled for an H200 as its own library launches it for bfloat16 "
            f"logits of {shape}, and the instructions of its loops over the vocabulary are counted "
            "in the machine code. Launches are recorded from the library's own host code."
        ),
        Picture("offline_instructions", "Instructions that one thread executes per logit"),
        Picture("offline_least_times", f"The least time of {shape} on an H200"),
        *(
            Block_
            for job in JOBS
            for Block_ in (Text(f"**{job}**: {JOBS[job]}."), table(results, job))
        ),
        Text("Not counted:"),
        Bullets([f"{name}: {reason}" for name, reason in results["left_out"].items()]),
        Text(
            "Per logit, or per pair of a policy's and a reference's: half a pair's figures are a "
            "logit's. The least time is the slowest of memory, instruction "
            "issue and special functions at an H200's peak rates; what is left out (launches, "
            "reductions' waiting at barriers, too few warps to hide latency) can only add to it. "
            "Of a second look at a row, the L2 holds what it has room for. "
            f"{results['compiler']} and its ptxas; commit {results['commit']}. From "
            "`bench/results/offline.json`, made by `make bench-offline`."
        ),
    ]


def job_blocks(results: dict[str, Any]) -> list[Block]:
    found: list[Block] = []
    for job, says in JOBS.items():
        found += [Text(f"**{job}**: {says}."), table(results, job)]
    return found


def table(results: dict[str, Any], job: str) -> Table:
    header = (
        "kernel", "computes", "per", "instructions", "MUFU", "loads", "reads", "bytes written",
        "barriers", "registers", "stack bytes", "least ms", "bound by", "launched with",
    )  # fmt: skip
    rows = [
        (
            f"{row['library']}: {row['name']}",
            row["computes"] + (f"; {row['notes']}" if row["notes"] else ""),
            row["unit"],
            " + ".join(f"{loop['instructions']:.1f}" for loop in row["loops"]),
            f"{row['mufu']:.2f}",
            f"{sum(loop['loads'] for loop in row['loops']):.2f}",
            f"{row['reads']:.0f}",
            f"{row['written']:.0f}",
            " + ".join(str(loop["barriers"]) for loop in row["loops"]),
            str(row["registers"]),
            str(row["stack"]),
            f"{row['least_ms']:.2f}",
            row["bound_by"],
            row["launch"],
        )
        for row in results["kernels"]
        if row["job"] == job
    ]
    return Table(header, rows)


def rank(row: dict[str, Any]) -> tuple[int, bool, float]:
    """Job by job, ours first, then the leanest."""
    per_logit = row["instructions"] / (2 if row["unit"] == "pair" else 1)
    return list(JOBS).index(row["job"]), row["library"] != OURS, per_logit


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "offline.json"
    )
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # libraries warn about what this machine lacks
    results = record() | {
        "compiler": f"Triton {triton.__version__}", "arch": ARCH, "chip": CHIP,
        "rows": ROWS, "vocab_size": VOCAB_SIZE,
    }  # fmt: skip
    with empty_cache():
        ours = our_rows()
        print("\n".join(map(shown, ours)))
        peers, left_out = peer_rows()
    kernels = sorted(ours + peers, key=rank)
    stand_ins = {call.library: call.stand_ins for call in CALLS if call.stand_ins}
    chip = CHIPS[CHIP]
    results["slots_per_logit"] = 2 * chip.sms * chip.clock * chip.issue / chip.bandwidth
    results |= {"kernels": kernels, "left_out": left_out, "stand_ins": stand_ins}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
