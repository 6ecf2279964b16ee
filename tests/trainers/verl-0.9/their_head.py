"""verl's own linear_cross_entropy on a CPU: its kernels in Triton's interpreter.

python -O their_head.py FILE   # without its assertions that tensors are on a GPU

FILE holds the arguments, and then the results.
"""

import os
import sys
from contextlib import nullcontext

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime.interpreter import InterpreterBuilder


def main(path):
    torch.cuda.nvtx.range = lambda *args: nullcontext()
    store = InterpreterBuilder.create_masked_store

    def store_under_bools(self, pointers, values, mask, *rest):
        # Comparisons of scalars are integers here, which the interpreter takes no masks of.
        mask.data = mask.data.astype(bool)
        return store(self, pointers, values, mask, *rest)

    InterpreterBuilder.create_masked_store = store_under_bools
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    results = []
    for hidden, weight, labels, temperature, reduction, upstream in torch.load(path):
        leaves = [t.requires_grad_() for t in (hidden, weight)]
        outputs = linear_cross_entropy(*leaves, labels, temperature, reduction)
        gradients = torch.autograd.grad(outputs, leaves, upstream)
        results.append([t.detach() for t in (*outputs, *gradients)])
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
