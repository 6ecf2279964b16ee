"""Kernels as another library might have them, counted by `bench/offline/`: prints the figures.

A script: Triton compiles only where TRITON_INTERPRET was never set.
"""

import json
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[2]))


@triton.jit
def sum_of_exponentials(logits_ptr, sum_ptr, row_stride, vocab_size, BLOCK: tl.constexpr):
    """Goes over the row twice: the maximum, and the sum of 2^(x - maximum)."""
    row_ptr = logits_ptr + tl.program_id(0).to(tl.int64) * row_stride
    offsets = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        here = start + offsets
        x = tl.load(row_ptr + here, mask=here < vocab_size, other=-float("inf"))
        highest = tl.maximum(highest, x.to(tl.float32))
    total = tl.zeros((BLOCK,), tl.float32)
    maximum = tl.max(highest, 0)
    for start in range(0, vocab_size, BLOCK):
        here = start + offsets
        x = tl.load(row_ptr + here, mask=here < vocab_size, other=-float("inf"))
        total += tl.exp2(x.to(tl.float32) - maximum)
    tl.store(sum_ptr + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def scaled(logits_ptr, factor_ptr, out_ptr, row_stride, vocab_size, BLOCK: tl.constexpr):
    """A tile per program, with a factor for each row."""
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    here = tile * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * row_stride + here, mask=here < vocab_size)
    product = x.to(tl.float32) * tl.load(factor_ptr + row)
    tl.store(out_ptr + row * row_stride + here, product.to(tl.bfloat16), mask=here < vocab_size)


def library_function(logits):
    """Host code that looks for a GPU, and chooses by which one it finds."""
    if not logits.is_cuda or logits.device.type != "cuda":
        raise ValueError("logits must be on a GPU")
    n_rows, vocab_size = logits[:, :].shape
    num_warps = 8 if torch.cuda.get_device_capability(logits.device) == (9, 0) else 4
    sums = torch.zeros(n_rows, device=logits.device)
    out = torch.empty_like(logits)
    shape = logits.stride(0), vocab_size
    sum_of_exponentials[(n_rows,)](logits, sums, *shape, BLOCK=4096, num_warps=num_warps)
    scaled[(n_rows, 64)](logits, sums, out, *shape, BLOCK=2048)
    return out.to(torch.float32)


def main():
    from bench.offline.calls import empty
    from bench.offline.count import count, figures
    from bench.offline.launches import recorded
    from kl_kernels.lab.codegen.compile import empty_cache

    first, second = recorded(lambda: library_function(empty(8192, 128256)))
    print(first.name, first.options, second.name, second.options, file=sys.stderr)
    found = {}
    with empty_cache():
        for launch, names in ((first, ("maximum", "sum")), (second, ())):
            kernel, loops, spills = count(launch, names, "BLOCK", unit_bytes=2)
            found[launch.name] = figures(kernel, loops, 2, spills, from_the_end=False)
        try:
            count(first, ("one",), "BLOCK", unit_bytes=2)
        except RuntimeError as error:
            found["one loop"] = str(error)
        try:
            count(first, ("maximum", "sum"), "BLOCK", unit_bytes=4)
        except RuntimeError as error:
            found["four bytes"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
