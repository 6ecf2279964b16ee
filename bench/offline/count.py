"""Counts kernels in machine code: ours as codegen has them, others' as their libraries launch them.

Needs a process in which TRITON_INTERPRET is not set, as `kl_kernels/lab/codegen/compile.py` does.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from typing import Any

from bench.offline.calls import version
from bench.offline.jobs import BACKWARD, KL, LOGPROB, OURS, ROWS, VOCAB_SIZE
from bench.offline.launches import Launch, recorded
from bench.offline.peers import CALLS, LEFT_OUT, Counted
from kl_kernels.lab.codegen import sass
from kl_kernels.lab.codegen.chips import CHIPS, Chip, limits, occupancy, second_look_hits
from kl_kernels.lab.codegen.compile import compile_for, compile_kernel, disassemble
from kl_kernels.lab.codegen.sass import Kernel, Loop
from kl_kernels.lab.codegen.variants import Shape, variants

ARCH, CHIP = "sm_90", "h200"
WARP = 32
SPILLS = ("LDL", "STL")


@dataclass(frozen=True)
class OurKernel:
    """A variant that codegen compiles, and its loops that run on ordinary logits."""

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
            "name": ours.variant,
            "library": OURS,
            "job": ours.job,
            "computes": ours.computes,
            "unit": variant.unit,
            "notes": "",
            "launch": f"{warps(kernel)}",
        }
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
    """The first launch; of an autotuned kernel every tile and number of warps.

    A number of stages matters to loops with matrix products alone.
    """
    if launches[0].tuned == 1:
        return launches[:1]
    kept: dict[str, Launch] = {}
    for launch in launches:
        constants = {n: v for n, v in launch.arguments.items() if isinstance(v, (int, float, str))}
        kept.setdefault(f"{constants} {launch.options.get('num_warps')}", launch)
    return list(kept.values())


def peer_row(launch: Launch, counted: Counted) -> dict[str, Any]:
    kernel, loops, spills = count(launch, counted.loops, counted.block, counted.unit_bytes)
    about = {
        "name": counted.name,
        "job": counted.job,
        "computes": counted.computes,
        "unit": counted.unit,
        "notes": counted.notes,
        "launch": f"tile of {launch.arguments[counted.block]}, {warps(kernel)}",
    }
    return about | figures(kernel, loops, counted.unit_bytes, spills, from_the_end=False)


def warps(kernel: Kernel) -> str:
    return "1 warp" if kernel.num_warps == 1 else f"{kernel.num_warps} warps"


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
    """Rename a program's loads for its whole row: they cost instructions, but hardly any traffic.

    Logits are read by the widest loads. RuntimeError: these read more or less than a tile.
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
            "name": name,
            "instructions": loop.instructions,
            "mufu": loop.mufu,
            "loads": loop.count("LDG.") / loop.units,
            "load_bytes": loop.load_width,
            "read": loop.read,
            "written": loop.bytes - loop.read,
            "barriers": loop.barriers,
            "shuffles": loop.shuffles,
            "units": loop.units,
        }
        for name, loop in loops.items()
    ]
    return {
        "registers": kernel.registers,
        "stack": kernel.stack,
        "spills": spills,
        "shared": kernel.shared,
        "num_warps": kernel.num_warps,
        "occupancy": occupancy(kernel.registers, kernel.shared, kernel.num_warps, chip),
        "instructions": sum(loop["instructions"] for loop in each),
        "mufu": sum(loop["mufu"] for loop in each),
        "reads": sum(loop["read"] for loop in each) / unit_bytes,
        "written": sum(loop["written"] for loop in each),
        "l2_hits": hits,
        "limits_ms": {name: 1e3 * s for name, s in times.items()},
        "least_ms": 1e3 * max(times.values()),
        "bound_by": max(times, key=times.__getitem__),
        "loops": each,
    }


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


def slots_per_logit() -> float:
    """Instructions that the chip issues in the time that it reads a bfloat16 logit."""
    chip = CHIPS[CHIP]
    return 2 * chip.sms * chip.clock * chip.issue / chip.bandwidth


def shown(row: dict[str, Any]) -> str:
    return (
        f"{row['job']:16}{row['name']:34}{row['instructions']:7.1f}{row['mufu']:6.2f} MUFU "
        f"{row['reads']:5.2f} reads {row['registers']:4} registers {row['stack']:5} stack "
        f"{row['least_ms']:6.2f} ms, {row['bound_by']}"
    )
