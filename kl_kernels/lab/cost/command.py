"""`python -m kl_kernels cost`: the operations of a public function on a GPU, priced without one."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch

from kl_kernels.checks import check_choice, check_integer
from kl_kernels.lab.codegen.chips import CHIPS
from kl_kernels.lab.cost.jobs import JOBS, MASKED_SHARE, Job, Size, made
from kl_kernels.lab.cost.ledger import Ledger, Operation, n_bytes
from kl_kernels.lab.cost.prices import Rates, flops_by_dtype, predicted, rates, seconds

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHOWN = 12  # lines of the table; the rest is one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("job", metavar="JOB", help=f"public function: {', '.join(JOBS)}")
    for name, value, what in (
        ("rows", 8192, "tokens"),
        ("width", 4096, "of hidden states"),
        ("vocab", 128256, "logits of a token"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=value, metavar="N", help=f"{what} (default: {value})"
        )
    parser.add_argument(
        "--dtype", default="bfloat16", help=f"{', '.join(DTYPES)} (default: bfloat16)"
    )
    parser.add_argument("--chip", default="h200", help=f"{', '.join(CHIPS)} (default: h200)")
    parser.add_argument("--frozen-head", action="store_true", help="no gradient of the weight")
    parser.add_argument(
        "--reference", action="store_true", help="fused_policy_loss: an exact KL to a reference"
    )
    parser.add_argument("--masked", action="store_true", help="a mask that half of the rows pass")
    parser.add_argument(
        "--listed", action="store_true", help="heads: that half by positions, not by a mask"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="ranks that share the vocabulary (default: 1)",
    )
    parser.add_argument("--json", action="store_true", help="every operation, as JSON")


def run(args: argparse.Namespace) -> int:
    check_choice("job", args.job, tuple(JOBS))
    check_choice("dtype", args.dtype, tuple(DTYPES))
    check_choice("chip", args.chip, tuple(CHIPS))
    for name in ("rows", "width", "vocab", "ranks"):
        check_integer(name, getattr(args, name), at_least=1)
    size = Size(
        rows=args.rows,
        width=args.width,
        vocab=args.vocab,
        dtype=DTYPES[args.dtype],
        frozen_head=args.frozen_head,
        reference=args.reference,
        masked=args.masked or args.listed,
        listed=args.listed,
        ranks=args.ranks,
    )
    found = cost(args.job, size, args.chip)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        _show(found, args.job, args.chip)
    return 0


def cost(name: str, size: Size, chip: str) -> dict[str, Any]:
    """Run a job forward and backward on meta tensors, and price what it runs.

    Args:
        name: a key of JOBS.
        size: its numbers.
        chip: a key of `codegen`'s CHIPS.

    Returns:
        Fields of the JSON: `operations`, `gemm_flops_by_operand_dtype`, `predicted_ms` (and its
        `forward_ms` and `backward_ms`), `gemm_ms`, `least_ms`, `launches` and `host_syncs`.
    """
    at = rates(chip)
    with made(name, size) as job:
        listed = passes(job, MASKED_SHARE if size.masked else 1.0)
    return summary(listed, at) | {"least_ms": 1e3 * _least(job, size, at)}


def summary(passes: dict[str, list[Operation]], at: Rates) -> dict[str, Any]:
    """Price the operations of both passes: the fields of `cost`, but for the least possible."""
    operations = [o for listed in passes.values() for o in listed]
    return {
        "operations": [
            asdict(o) | {"pass": which, "predicted_us": 1e6 * seconds(o, at)}
            for which, listed in passes.items()
            for o in listed
        ],
        "gemm_flops_by_operand_dtype": flops_by_dtype(operations),
        "predicted_ms": 1e3 * sum(predicted(listed, at) for listed in passes.values()),
        "forward_ms": 1e3 * predicted(passes["forward"], at),
        "backward_ms": 1e3 * predicted(passes["backward"], at),
        "gemm_ms": 1e3 * sum(seconds(o, at) for o in operations if o.flops),
        "launches": sum(o.launches for o in operations),
        "host_syncs": sum(o.host_syncs for o in operations),
    }


def passes(job: Job, share: float) -> dict[str, list[Operation]]:
    """Run a job, and differentiate all that it returns."""
    with Ledger(share) as forward:
        result = job.forward()
    outputs = result if isinstance(result, tuple) else (result,)
    differentiable = [o for o in outputs if isinstance(o, torch.Tensor) and o.requires_grad]
    upstream = [torch.empty_like(o) for o in differentiable]
    with Ledger(share) as backward:
        torch.autograd.grad(differentiable, job.leaves, upstream)
    return {"forward": forward.operations, "backward": backward.operations}


def _least(job: Job, size: Size, at: Rates) -> float:
    """Seconds of the fewest products, or of reading inputs once and writing gradients once."""
    share = MASKED_SHARE if size.masked else 1.0
    flops = 2 * size.rows * size.width * size.local_vocab * job.products * share
    dtype = str(size.dtype).removeprefix("torch.")
    traffic = 2 * sum(map(n_bytes, job.leaves)) + sum(map(n_bytes, job.constants))
    return max(flops / at.product[dtype], traffic / at.memory)


def _show(found: dict[str, Any], name: str, chip: str) -> None:
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for operation in found["operations"]:
        key = tuple(operation[field] for field in ("pass", "op", "operand_dtype", "result_dtype"))
        groups.setdefault(key, []).append(operation)
    lines = sorted(groups.items(), key=lambda item: -_sum(item[1], "predicted_us"))
    header = ("operation", "dtypes", "calls", "TFLOP", "GB", "ms")
    rows = [header, *(_line(key, listed) for key, listed in lines[:SHOWN])]
    if rest := [o for _, listed in lines[SHOWN:] for o in listed]:
        rows.append(_line(("", "others", "", ""), rest))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, second, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[2:])]
        print(f"{first:{widths[0]}}  {second:{widths[1]}}  {'  '.join(cells)}")
    print(
        f"\n{name} on {chip}, predicted: {found['predicted_ms']:.1f} ms, forward "
        f"{found['forward_ms']:.1f} and backward {found['backward_ms']:.1f}; matrix products alone "
        f"{found['gemm_ms']:.1f}; the least possible {found['least_ms']:.1f}"
    )
    print(f"{found['launches']} kernels, {found['host_syncs']} waits of the host")


def _line(key: tuple[str, ...], listed: list[dict[str, Any]]) -> tuple[str, ...]:
    which, op, of, to = key
    return (
        f"{which} {op}".strip(),
        of if of == to else f"{of} -> {to}",
        str(len(listed)),
        f"{_sum(listed, 'flops') / 1e12:.2f}",
        f"{_sum(listed, 'bytes') / 1e9:.2f}",
        f"{_sum(listed, 'predicted_us') / 1e3:.2f}",
    )


def _sum(listed: list[dict[str, Any]], field: str) -> float:
    return float(sum(o[field] for o in listed))
