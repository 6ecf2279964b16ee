"""How many rows the GPU kernels fold twice, or carefully: `bench/results/careful.json`.

The kernels' rules, applied to a language model's logits: those of a small one trained here (some
minutes), or of the models in two folders. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from careful_logits import Case, cases, trained_models
from careful_rules import CudaRule, Loops, Rule, TritonRule, loops_taken
from machine import record
from torch import Tensor
from transformers.utils import logging as transformers_logging

from kl_kernels.codegen.compile import compile_for, empty_cache
from kl_kernels.codegen.variants import Shape, variants
from kl_kernels.ppo.model import load_model

ARCH = "sm_90"
# Of csrc/cuda's loops over aligned bfloat16 pairs, counted in the SASS of nvcc 13 for sm_90.
CUDA_INSTRUCTIONS = {"fast": 12.81, "guarded": 17.81, "careful": 29.19}
CUDA = CudaRule.of_header()
RULES: dict[str, Callable[[Tensor, Tensor], Rule]] = {
    "triton": TritonRule.for_logits,
    "cuda": lambda *_: CUDA,
    # What other rules would do.
    "cuda, sums up to 2^15": lambda *_: replace(CUDA, crowded=2**15),
}


def triton_instructions() -> dict[str, float]:
    """Per pair of logits."""
    with empty_cache():
        kernel, _ = compile_for(ARCH, variants(Shape(8192, 128256))[0])
    return {name: round(loop.instructions, 2) for name, loop in kernel.loops.items()}


def drawn(case: Case, generator: torch.Generator) -> Tensor:  # [R]
    """A token for each row, as a rollout would have it."""
    p = (case.logits.float() / case.temperature).softmax(-1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


def figures(
    loops: Tensor, part_size: int, vocab_size: int, instructions: dict[str, float]
) -> dict[str, float]:
    """Shares of rows and parts, and what they make a pair of logits cost."""
    n_parts = loops.shape[1]
    sizes = torch.full((n_parts,), float(part_size))
    sizes[-1] = vocab_size - part_size * (n_parts - 1)
    weight = sizes / vocab_size  # of each part
    taken = {loop: (loops & loop) != 0 for loop in Loops}
    careful = taken[Loops.CAREFUL]
    twice = careful & (loops != Loops.CAREFUL)
    share = {loop: (by.float() @ weight).mean().item() for loop, by in taken.items()}
    return {
        "parts": n_parts,
        "rows_careful": careful.any(1).float().mean().item(),
        "parts_careful": careful.float().mean().item(),
        "parts_twice": twice.float().mean().item(),
        "instructions_per_pair": sum(
            share[Loops[loop.upper()]] * cost for loop, cost in instructions.items()
        ),
        "reads": sum(share.values()),
    }


def measure(
    case: Case, generator: torch.Generator, instructions: dict[str, Any]
) -> list[dict[str, Any]]:
    vocab_size = case.logits.shape[1]
    measured = []
    for tokens, ids in {"sampled": drawn(case, generator), "next": case.next_ids}.items():
        for name, rule_for in RULES.items():
            loops = loops_taken(rule_for, case.logits, case.ref_logits, ids, case.temperature)
            part_size = rule_for(case.logits, case.ref_logits).part_size(vocab_size)
            found = figures(loops, part_size, vocab_size, instructions[name.partition(",")[0]])
            what = {"case": case.name, "vocab_size": vocab_size, "tokens": tokens, "rule": name}
            measured.append(what | found)
            print(
                f"{case.name:40}{vocab_size:7} {tokens:8}{name:24}{found['rows_careful']:8.2%}"
                f"{found['parts_careful']:8.2%}{found['parts_twice']:8.2%}"
                f"{found['instructions_per_pair']:7.1f}",
                flush=True,
            )
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, help="folder of a Hugging Face causal LM")
    parser.add_argument("--reference", type=Path, help="folder of the one it was trained from")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/careful.json")
    args = parser.parse_args()
    if (args.policy is None) != (args.reference is None):
        parser.error("--policy and --reference go together")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers_logging.set_verbosity_error()
    results = record() | {"seed": args.seed, "rows": args.rows}
    results["instructions"] = {"triton": triton_instructions(), "cuda": CUDA_INSTRUCTIONS}
    if args.policy:
        policy, tokenizer = load_model(args.policy)
        reference, _ = load_model(args.reference)
    else:
        policy, reference, tokenizer = trained_models(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    results["measurements"] = [
        measurement
        for case in cases(policy, reference, tokenizer, args.rows)
        for measurement in measure(case, generator, results["instructions"])
    ]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
