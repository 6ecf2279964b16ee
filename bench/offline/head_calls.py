"""Linear heads of other packages, run on tensors without data for the ledger of `cost`.

A package's own Python code runs where it runs on meta tensors, its Triton kernels replaced by what
they read and write. Where it asks for a GPU first, or a kernel multiplies matrices itself, its
algorithm is written down here, and the lines that it was read from are named.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from kl_kernels.lab.cost.command import passes
from kl_kernels.lab.cost.jobs import Job, Size
from kl_kernels.lab.cost.ledger import Ledger, Operation, n_bytes

Passes = dict[str, list[Operation]]
RESPONSES = 8  # that the rows belong to, where a package goes over them one by one
FLOAT32 = torch.float32


def kernel(name: str, *moved: Tensor, flops: int = 0) -> None:
    """Record a Triton kernel by the tensors it reads or writes, and its products' FLOP."""
    ledger = _get_current_dispatch_mode()
    assert isinstance(ledger, Ledger)
    dtype = str(moved[0].dtype).removeprefix("torch.")
    shapes = tuple(tuple(t.shape) for t in moved)
    size = sum(map(n_bytes, moved))
    ledger.operations.append(
        Operation(name, shapes, dtype, dtype, flops, size, 1, host_syncs=0, is_ours=False)
    )


def product(a: Tensor, b: Tensor) -> int:  # [n, k], [k, m]
    """FLOP of a @ b."""
    return 2 * a.numel() * b.shape[1]


@dataclass(frozen=True)
class Head:
    hidden: Tensor  # [N, d]
    weight: Tensor  # [V, d]
    token_ids: Tensor  # [N]

    @classmethod
    def of(cls, size: Size) -> Head:
        def empty(*shape: int, dtype: torch.dtype = size.dtype) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        return cls(
            empty(size.rows, size.width).requires_grad_(),
            empty(size.vocab, size.width).requires_grad_(not size.frozen_head),
            empty(size.rows, dtype=torch.int64),
        )

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad

    @property
    def leaves(self) -> list[Tensor]:
        return [self.hidden, self.weight] if self.trained else [self.hidden]

    def passes(self, forward: Callable[[], object]) -> Passes:
        return passes(Job(forward, self.leaves, [], 0), share=1.0)


def by_hand(forward: Callable[[], None], backward: Callable[[], None] = lambda: None) -> Passes:
    """Both passes of an algorithm that autograd does not know."""
    found = {}
    for name, call in (("forward", forward), ("backward", backward)):
        with Ledger() as ledger, torch.no_grad():
            call()
        found[name] = ledger.operations
    return found


def eager(head: Head) -> Passes:
    def forward() -> tuple[Tensor, Tensor]:
        log_p = (head.hidden @ head.weight.T).float().log_softmax(-1)
        logprob = log_p.gather(-1, head.token_ids[:, None]).squeeze(-1)
        return logprob, -(log_p.exp() * log_p).sum(-1)

    return head.passes(forward)


def linear_cross_entropy(head: Head) -> Passes:
    function = torch.nn.functional.linear_cross_entropy
    return head.passes(lambda: function(head.hidden, head.weight, head.token_ids, reduction="none"))


def trl(head: Head) -> Passes:
    from trl.kernels import chunked_logprob
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
        """As on a GPU: `_addmm_fp32`, chunked_logprob.py:56 of TRL 1.16.0."""
        torch.addmm(total, a, b, out_dtype=FLOAT32, out=total)

    stand_ins = {
        "_forward_tile": lambda tile, *_, **__: kernel("_forward_kernel", tile),
        "_backward_tile": lambda tile, *_, **__: kernel("_backward_kernel", tile, tile),
        "_addmm_fp32": add_product,
    }
    # Autocast does not know the meta device.
    no_autocast = mock.patch.object(torch, "is_autocast_enabled", return_value=False)
    with no_autocast, mock.patch.multiple(chunked_logprob, **stand_ins):
        return head.passes(
            lambda: chunked_logprob.ChunkedLogProbFunction.apply(
                head.hidden, head.weight, None, head.token_ids, 1.0,
                _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",),
            )[:2]
        )  # fmt: skip


def liger_cross_entropy(head: Head) -> Passes:
    """Liger's fused linear cross-entropy, reduction "mean": gradients in the forward pass.

    fused_linear_cross_entropy.py of liger-kernel 0.8.5: chunks as in lines 108-111, a product and
    a kernel that writes the gradient over the logits (176-222), a product (311-314), and one that
    is added to a gradient in the weight's dtype (358-363).
    """

    def forward() -> None:
        (n, d), v = head.hidden.shape, len(head.weight)
        factor = -(-v // d)
        rows = min(n, 1 << (-(-n // factor) - 1).bit_length())
        grad_hidden = torch.zeros_like(head.hidden)
        grad_weight = torch.zeros_like(head.weight) if head.trained else None
        logits = head.hidden.new_empty(rows, v)
        for start in range(0, n, rows):
            hidden = head.hidden[start : start + rows]
            tile = logits[: len(hidden)]
            torch.mm(hidden, head.weight.T, out=tile)
            kernel("liger_cross_entropy_kernel", tile, tile, tile)  # reads it twice
            torch.mm(tile, head.weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                torch.addmm(grad_weight, tile.T, hidden, out=grad_weight)

    return by_hand(forward)


def liger_grpo(head: Head) -> Passes:
    """Its own code, whose forward pass makes the gradients. Its backward waits for a number."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def by_response(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (RESPONSES, -1))

    numbers = by_response(torch.empty_like(head.token_ids, dtype=FLOAT32))
    loss = LigerFusedLinearGRPOLoss(compiled=False)  # only [B, T] numbers would be compiled

    def forward() -> None:
        loss(
            by_response(head.hidden), head.weight, by_response(head.token_ids), numbers,
            numbers[:, 0], ref_per_token_logps=numbers, old_per_token_logps=numbers,
        )  # fmt: skip

    return by_hand(forward)


def verl_chunked(head: Head) -> Passes:
    from verl.utils.experimental.torch_functional import FusedLinearForPPOFunction

    return head.passes(
        lambda: FusedLinearForPPOFunction.apply(head.hidden, head.weight, head.token_ids)
    )


def verl_triton(head: Head) -> Passes:
    """verl's linear_cross_entropy: both gradients always.

    kernels.py of verl 0.9.1: one product in forward (188-340), in backward for every 9504 columns
    one that writes gradients of logits and two more (1663-1721).
    """
    n, v = len(head.hidden), len(head.weight)
    columns = 9504

    def forward() -> None:
        flops = product(head.hidden, head.weight.T)
        kernel("efficient_entropy_kernel_general_mainloop", head.hidden, head.weight, flops=flops)

    def backward() -> None:
        grad_hidden, grad_weight = torch.empty_like(head.hidden), torch.empty_like(head.weight)
        for start in range(0, v, columns):
            weight = head.weight[start : start + columns]
            tile = head.hidden.new_empty(n, len(weight))
            flops = product(head.hidden, weight.T)
            kernel("d_logits_split_N", head.hidden, weight, tile, flops=flops)
            if start == 0:
                torch.matmul(tile, weight, out=grad_hidden)
            else:
                grad_hidden.add_(torch.matmul(tile, weight))
            torch.matmul(tile.T, head.hidden, out=grad_weight[start : start + columns])

    return by_hand(forward, backward)


def cut_cross_entropy(head: Head) -> Passes:
    """Cut Cross-Entropy, no block left out.

    Release 25.1.1: one product in cce_lse_forward.py:61-71; in cce_backward.py one again (132-143),
    one for hidden states (183-196) and, unless it is frozen, one for the weight (201-215).
    """
    flops = product(head.hidden, head.weight.T)

    def forward() -> None:
        kernel("_cce_lse_forward_kernel", head.hidden, head.weight, flops=flops)

    def backward() -> None:
        gradients = [torch.zeros_like(leaf) for leaf in head.leaves]
        factors = head.hidden, head.weight, *gradients
        kernel("_cce_backward_kernel", *factors, flops=(1 + len(gradients)) * flops)

    return by_hand(forward, backward)


@dataclass(frozen=True)
class Call:
    name: str
    package: str  # its distribution
    computes: str
    run: Callable[[Head], Passes]


STATISTICS, LOGPROB = "log-probability and entropy", "log-probability"
CALLS: Sequence[Call] = (
    Call("torch eager", "torch", f"{STATISTICS}, stores all logits", eager),
    Call("torch linear_cross_entropy", "torch", f"{LOGPROB}, stores all logits",
         linear_cross_entropy),
    Call("TRL chunked head", "trl", STATISTICS, trl),
    Call("Liger fused linear cross-entropy", "liger-kernel", "mean log-probability",
         liger_cross_entropy),
    Call("Liger fused linear GRPO loss", "liger-kernel", "GRPO's loss", liger_grpo),
    Call("verl chunked head", "verl", STATISTICS, verl_chunked),
    Call("verl linear_cross_entropy", "verl", STATISTICS, verl_triton),
    Call("Cut Cross-Entropy", "cut-cross-entropy", LOGPROB, cut_cross_entropy),
)  # fmt: skip
