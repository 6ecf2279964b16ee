"""Calls of operators on a few rows of a production vocabulary, whose kernels are counted.

Rows are ordinary, a policy not far from its reference, unless a job says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kl_kernels.backends import reference
from kl_kernels.schemas import (
    ESTIMATORS,
    OPERATORS,
    STATE_FIELDS,
    FoldPartArgs,
    TokenJSDArgs,
    TokenKLArgs,
)

ALIGNED, UNALIGNED, LARGE = 50304, 50257, 128256
BF16, FP32 = torch.bfloat16, torch.float32
BACKENDS = ("triton", "cuda")
PARTS = 8
SCALED_ROWS = 64  # fewer would leave most programs without work
LATE = [12000, 31000, 44000]  # behind the first tile of every split but the last
GAE = {
    "rewards": torch.ones(8, 2048),
    "values": torch.ones(8, 2048),
    "mask": torch.ones(8, 2048, dtype=torch.bool),
    "gamma": 0.99,
    "lam": 0.95,
    "skip_masked": True,
    "cu_seqlens": None,
}


class Job(NamedTuple):
    """One call.

    Attributes:
        name: of what is computed.
        operator: a key of OPERATORS.
        changes: arguments that are not `operands`'.
        rows: how many; of unaligned vocabularies eight, which begin at every multiple of two bytes.
        late_peak: whether a logit far above the first tile makes the fast loop's sums unsound.
    """

    name: str
    operator: str
    backend: str
    arch: str
    dtype: torch.dtype
    vocab_size: int
    changes: dict[str, Any]
    rows: int
    late_peak: bool = False

    @property
    def label(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.backend}, {self.arch}, {self.name}, {dtype}, V = {self.vocab_size}"

    def arguments(self) -> Any:
        known = operands(self.rows, self.vocab_size, self.dtype)
        if self.late_peak:
            for logits in (known["logits"], known["ref_logits"]):
                logits[..., LATE] = 300.0
        return arguments(OPERATORS[self.operator].args, known | self.changes)


# Name, operator and arguments: of what is counted for rows of every kind.
OVER_LOGITS: list[tuple[str, str, dict[str, Any]]] = [
    ("forward", "token_stats", {}),
    ("forward, reference", "token_kl", {}),
    ("backward", "token_stats_backward", {}),
    ("backward, reference", "token_kl_backward", {"grad_forward_kl": None}),
    ("policy loss", "policy_loss", {"ref_logits": None, "kl_coef": 0.0}),
    ("policy loss, reference", "policy_loss", {}),
    ("mixture", "token_jsd", {}),
]
FURTHER: list[tuple[str, str, dict[str, Any]]] = [
    ("rewards", "kl_rewards", {}),
    ("backward, both KLs", "token_kl_backward", {}),
    ("backward of the mixture", "token_jsd_backward", {}),
    ("mixture of a part", "mixture_part", {}),
    ("part", "fold_part", {}),
    ("tail", "fold_tail", {}),
    ("finish parts", "finish_parts", {}),
    ("scale", "scale_gradient", {}),
    ("gae", "gae", GAE),
]


def jobs() -> Iterator[Job]:
    for backend in BACKENDS:
        for dtype in (BF16, FP32):
            for vocab_size in (ALIGNED, UNALIGNED):
                for entry in OVER_LOGITS:
                    yield job(entry, backend, "sm_90", dtype, vocab_size)
        for entry in OVER_LOGITS:
            yield job(entry, backend, "sm_90", BF16, LARGE)
        for entry in FURTHER:
            yield job(entry, backend, "sm_90", BF16, ALIGNED)
        for name, operator, changes in OVER_LOGITS[:2]:
            entry = f"{name}, late peak", operator, changes
            yield job(entry, backend, "sm_90", BF16, ALIGNED)._replace(late_peak=True)
        for entry in OVER_LOGITS:
            yield job(entry, backend, "sm_80", BF16, ALIGNED)


def quick() -> list[Job]:
    """Select jobs for a test, with reads, writes and shared memory of rows that cost most."""
    wanted = [
        ("triton", "forward, reference", UNALIGNED),
        ("triton", "backward, reference", UNALIGNED),
        ("triton", "policy loss, reference", ALIGNED),
        ("cuda", "forward, reference", UNALIGNED),
        ("cuda", "backward, reference", UNALIGNED),
        ("cuda", "policy loss, reference", UNALIGNED),
    ]
    return [
        job
        for job in jobs()
        if (job.backend, job.name, job.vocab_size) in wanted
        and (job.arch, job.dtype) == ("sm_90", BF16)
    ]


def job(
    entry: tuple[str, str, dict[str, Any]],
    backend: str,
    arch: str,
    dtype: torch.dtype,
    vocab_size: int,
) -> Job:
    name, operator, changes = entry
    rows = 8 if vocab_size == UNALIGNED else 2
    return Job(name, operator, backend, arch, dtype, vocab_size, changes, rows)


def operands(n_rows: int, vocab_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """Every argument that any operator has, by name."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def aligned(values: Tensor) -> Tensor:
        """A copy that begins at a multiple of 256 bytes, as a GPU's allocations do."""
        room = torch.zeros(values.numel() + 256 // dtype.itemsize, dtype=dtype)
        skip = -room.data_ptr() % 256 // dtype.itemsize
        return room[skip : skip + values.numel()].view(values.shape).copy_(values)

    rows = 1, n_rows
    ref_logits = (3 * normal(*rows, vocab_size)).to(dtype)
    logits = (ref_logits + 0.3 * normal(*rows, vocab_size)).to(dtype)
    models = {
        "logits": aligned(logits),
        "ref_logits": aligned(ref_logits),
        "mask": torch.ones(rows, dtype=torch.bool),
        "token_ids": logits.float().argmax(-1),
        "temperature": 1.0,
        "ref_temperature": 1.0,
        "softcap": None,
        "ref_softcap": None,
        "beta": 0.5,
    }
    out = reference.token_kl(arguments(TokenKLArgs, models))
    state = reference.fold_part(arguments(FoldPartArgs, models)).float()
    states = state.repeat(PARTS, 1, 1, 1)
    states[1:, [STATE_FIELDS.index("token_tx"), STATE_FIELDS.index("token_ty")]] = math.inf
    grads = {
        f"grad_{name}": normal(*rows) for name in ("logprob", "kl", "forward_kl", "entropy", "jsd")
    }
    return models | {
        **grads,
        "policy_state": out.policy_state.float(),
        "ref_state": out.ref_state.float(),
        "grad_logits": aligned(torch.zeros_like(logits)),
        "gradient": aligned(normal(1, SCALED_ROWS, vocab_size)),
        "skipped_ids": (700 * torch.arange(64)).expand(*rows, -1).contiguous(),
        "kl": out.kl.float(),
        "entropy": out.entropy.float(),
        "mixture_kl": reference.token_jsd(arguments(TokenJSDArgs, models)).mixture_kl.float(),
        "scores": torch.ones(1),
        "score_index": torch.tensor([n_rows - 1]),
        "estimator": ESTIMATORS.index("exact"),
        "kl_clip": None,
        "old_logprobs": out.logprob.float(),
        "advantages": normal(*rows),
        "token_weights": torch.full(rows, 1 / n_rows),
        "importance_weights": None,
        "ref_logprobs": None,
        "own_gradient": None,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": 3.0,
        "log_ratio_clamp": 20.0,
        "kl_estimator": ESTIMATORS.index("exact"),
        "kl_coef": 0.1,
        "entropy_coef": 0.01,
        "part": False,
        "states": states,
        "ranges": None,
        "factor": torch.tensor(0.5),
    }


def arguments(cls: type[Any], known: dict[str, Any]) -> Any:
    return cls(**{field: known[field] for field in cls._fields})
