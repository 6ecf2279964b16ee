"""The CUDA kernels, compiled for the host, as one more backend."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import math
import os
import subprocess
from ctypes import byref, c_bool, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from kl_kernels.schemas import (
    MIXTURE_SUMS,
    OPERATORS,
    POLICY_LOSS_TERMS,
    FinishPartsArgs,
    FoldPartArgs,
    FoldTailArgs,
    GAEArgs,
    GAEOutputs,
    KLRewardsArgs,
    KLRewardsOutputs,
    MixturePartArgs,
    PolicyLossArgs,
    ScaleGradientArgs,
    TokenJSDArgs,
    TokenJSDBackwardArgs,
    TokenJSDOutputs,
    TokenKLArgs,
    TokenKLBackwardArgs,
    TokenKLOutputs,
    TokenStatsArgs,
    TokenStatsBackwardArgs,
    TokenStatsOutputs,
    state_fields,
)

HERE = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# -fno-strict-aliasing: as nvcc has it. The kernels' unrolling is not for g++. With fortification a
# jump from fiber to fiber would be taken for an error.
FLAGS = [
    "-std=c++20",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-pthread",
]


# Shared by all test processes of a checkout: each program takes g++ ten seconds and more.
COMPILED = HERE.parents[2] / "build" / "cuda_on_host"


def compile_host(source: str, *flags: str) -> Path:
    """Compile a file of this folder, unless there is a program of the very same text already."""
    command = ["g++", *FLAGS, *flags, f"-I{HERE}"]
    listed = subprocess.run(
        [*command, "-E", str(HERE / source)], capture_output=True, check=True
    ).stdout
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(b"\0".join([compiler, " ".join(command).encode(), listed])).hexdigest()
    COMPILED.mkdir(parents=True, exist_ok=True)
    target = COMPILED / key[:16]
    with (COMPILED / f"{key[:16]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # whoever is second waits for the first
        if not target.exists():
            whole = target.with_suffix(".part")
            result = subprocess.run(
                [*command, str(HERE / source), "-o", str(whole)], capture_output=True, text=True
            )
            assert result.returncode == 0, result.stderr
            os.replace(whole, target)  # a compiler that is killed leaves no program
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, loaded once per process."""
    path = compile_host("kernels.cpp", "-O1", "-fPIC", "-shared", "-DCUDA_ON_HOST_FIBERS")
    loaded = ctypes.CDLL(str(path))
    loaded.host_scratch_bytes.restype = loaded.host_mix_scratch_bytes.restype = c_int64
    return loaded


# The structs of csrc/cuda/operators.h.


class Logits(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int),
        ("stride_b", c_int64),
        ("stride_t", c_int64),
        ("k", c_float),
        ("softcap", c_float),
    ]

    @classmethod
    def of(cls, logits: Tensor, temperature: float, softcap: float | None) -> Logits:
        assert logits.stride(2) == 1 or logits.shape[2] == 1
        k = 1 / math.log(2) / temperature
        return cls(
            logits.data_ptr(),
            DTYPES[logits.dtype],
            logits.stride(0),
            logits.stride(1),
            k,
            softcap or 0.0,
        )


class GradLogits(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride_b", c_int64), ("stride_t", c_int64)]

    @classmethod
    def of(cls, grad_logits: Tensor | None) -> GradLogits:
        if grad_logits is None:
            return cls()
        assert grad_logits.stride(2) == 1 or grad_logits.shape[2] == 1
        return cls(grad_logits.data_ptr(), grad_logits.stride(0), grad_logits.stride(1))


class Rows(ctypes.Structure):
    _fields_ = [
        ("n_rows", c_int64),
        ("n_tokens", c_int64),
        ("vocab_size", c_int64),
        ("token_ids", c_void_p),
        ("mask", c_void_p),
    ]

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor | None, mask: Tensor | None) -> Rows:
        n_batch, n_tokens, vocab_size = logits.shape
        return cls(n_batch * n_tokens, n_tokens, vocab_size, pointer(token_ids), pointer(mask))


OUTPUTS = ("logprob", "ref_logprob", "kl", "forward_kl", "entropy")
STATES = ("policy_state", "ref_state")
REWARDS = ("rewards", "advantage_correction")


class Outputs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in (*OUTPUTS, *STATES, *REWARDS, "part_state")]


class PartStates(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p),
        ("ranges", c_void_p),
        ("n_parts", c_int64),
        ("n_rows", c_int64),
        ("has_ref", c_bool),
    ]


class SkippedIds(ctypes.Structure):
    _fields_ = [("ids", c_void_p), ("per_row", c_int64)]


class RewardParams(ctypes.Structure):
    _fields_ = [
        ("scores", c_void_p),
        ("score_index", c_void_p),
        ("kl_coef", c_float),
        ("estimator", c_int),
        ("kl_clip", c_float),
    ]


GRADS = ("grad_logprob", "grad_kl", "grad_forward_kl", "grad_entropy")
SAVED = (*GRADS, *STATES, "kl", "entropy")


class Saved(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in SAVED),
        ("temperature", c_double),
        ("part", c_bool),
    ]


class FinishedRows(ctypes.Structure):
    _fields_ = [*((name, c_void_p) for name in STATES), ("beta", c_double)]


class MixtureOutputs(ctypes.Structure):
    _fields_ = [("jsd", c_void_p), ("kl", c_void_p), ("part", c_bool)]


class SavedMixture(ctypes.Structure):
    _fields_ = [("grad_jsd", c_void_p), ("mixture_kl", c_void_p), ("temperature", c_double)]


TOKENS = ("old_logprobs", "advantages", "token_weights", "importance_weights", "ref_logprobs")


class PolicyLossTokens(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in TOKENS]


class PolicyLossParams(ctypes.Structure):
    _fields_ = [
        *((name, c_float) for name in ("clip_low", "clip_high", "dual_clip", "log_ratio_clamp")),
        ("kl_coef", c_float),
        ("entropy_coef", c_float),
        ("estimator", c_int),
    ]


# The device the kernels believe to run on: shared memory of a block and of an SM (of which every
# block loses 1 kB), in bytes, and whether there are clusters.
H200 = 227 << 10, 228 << 10, 16


def pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def run_as(device: tuple[int, int, int]) -> None:
    library().host_device(*map(c_int, device))


def blocks_per_row(vocab_size: int, dtype: torch.dtype, with_reference: bool) -> int:
    """Return the number of blocks that keep a row in the kernels for a GPU; 0: it is read again."""
    return library().host_blocks_per_row(
        c_int64(vocab_size), c_bool(dtype == torch.float32), c_bool(with_reference)
    )


def models(a) -> tuple[Logits, Logits]:
    """Policy and reference of an operator's arguments."""
    policy = Logits.of(a.logits, a.temperature, a.softcap)
    if getattr(a, "ref_logits", None) is None:
        return policy, Logits()
    return policy, Logits.of(a.ref_logits, a.ref_temperature, a.ref_softcap)


def or_infinity(bound: float | None) -> float:
    return math.inf if bound is None else bound


def forward(a, names: tuple[str, ...], params: RewardParams | None = None) -> tuple[Tensor, ...]:
    n_batch, n_tokens, _ = a.logits.shape
    policy, reference = models(a)
    n_fields = len(state_fields(has_ref=bool(reference.data)))
    leading = dict.fromkeys(STATES, (2,)) | {"part_state": (n_fields,)}
    tensors = {name: torch.empty(*leading.get(name, ()), n_batch, n_tokens) for name in names}
    rows = Rows.of(a.logits, getattr(a, "token_ids", None), a.mask)
    scratch = torch.empty(library().host_scratch_bytes(byref(rows)), dtype=torch.uint8)
    outputs = Outputs(**{name: pointer(tensor) for name, tensor in tensors.items()})
    assert not library().host_forward(
        byref(rows),
        byref(policy),
        byref(reference),
        byref(outputs),
        byref(params or RewardParams()),
        c_void_p(scratch.data_ptr()),
    )
    return tuple(tensors[name] for name in names)


def fold_part(a: FoldPartArgs) -> Tensor:
    return forward(a, ("part_state",))[0]


def fold_tail(a: FoldTailArgs) -> Tensor:
    policy, _ = models(a)
    rows = Rows.of(a.logits, a.token_ids, a.mask)
    state = torch.empty(len(state_fields(has_ref=False)), *a.logits.shape[:2])
    scratch = torch.empty(library().host_scratch_bytes(byref(rows)), dtype=torch.uint8)
    assert not library().host_fold_tail(
        byref(rows),
        byref(policy),
        byref(SkippedIds(pointer(a.skipped_ids), a.skipped_ids.shape[-1])),
        byref(Outputs(part_state=pointer(state))),
        c_void_p(scratch.data_ptr()),
    )
    return state


def finish_parts(a: FinishPartsArgs) -> TokenKLOutputs:
    n_parts, n_fields, *rows = a.states.shape
    parts = PartStates(
        pointer(a.states),
        pointer(a.ranges),
        n_parts,
        math.prod(rows),
        n_fields == len(state_fields(has_ref=True)),
    )
    leading = dict.fromkeys(STATES, (2,))
    out = {name: torch.empty(*leading.get(name, ()), *rows) for name in TokenKLOutputs._fields}
    outputs = Outputs(**{name: pointer(tensor) for name, tensor in out.items()})
    assert not library().host_finish_parts(byref(parts), c_void_p(pointer(a.mask)), byref(outputs))
    return TokenKLOutputs(**out)


def token_stats(a: TokenStatsArgs) -> TokenStatsOutputs:
    return TokenStatsOutputs(*forward(a, TokenStatsOutputs._fields))


def token_kl(a: TokenKLArgs) -> TokenKLOutputs:
    return TokenKLOutputs(*forward(a, TokenKLOutputs._fields))


def kl_rewards(a: KLRewardsArgs) -> KLRewardsOutputs:
    params = RewardParams(
        scores=pointer(a.scores),
        score_index=pointer(a.score_index),
        kl_coef=a.kl_coef,
        estimator=a.estimator,
        kl_clip=or_infinity(a.kl_clip),
    )
    return KLRewardsOutputs(*forward(a, KLRewardsOutputs._fields, params))


def mix(a: TokenJSDArgs | MixturePartArgs, outputs: TokenJSDOutputs, *, part: bool) -> None:
    policy, reference = models(a)
    rows = Rows.of(a.logits, None, a.mask)
    scratch = torch.empty(library().host_mix_scratch_bytes(byref(rows)), dtype=torch.uint8)
    states = pointer(outputs.policy_state), pointer(outputs.ref_state)
    assert not library().host_mix(
        byref(rows),
        byref(policy),
        byref(reference),
        byref(FinishedRows(*states, a.beta)),
        byref(MixtureOutputs(pointer(outputs.jsd), pointer(outputs.mixture_kl), part)),
        c_void_p(scratch.data_ptr()),
    )


def token_jsd(a: TokenJSDArgs) -> TokenJSDOutputs:
    jsd, mixture_kl = torch.empty(a.logits.shape[:2]), torch.empty(a.logits.shape[:2])
    out = TokenJSDOutputs(jsd, mixture_kl, *forward(a, STATES))
    mix(a, out, part=False)
    return out


def mixture_part(a: MixturePartArgs) -> Tensor:
    sums = torch.empty(len(MIXTURE_SUMS), *a.logits.shape[:2])
    mix(a, TokenJSDOutputs(*sums.unbind(), a.policy_state, a.ref_state), part=True)
    return sums


def token_jsd_backward(a: TokenJSDBackwardArgs) -> None:
    policy, reference = models(a)
    assert not library().host_mix_backward(
        byref(Rows.of(a.logits, None, a.mask)),
        byref(policy),
        byref(reference),
        byref(FinishedRows(pointer(a.policy_state), pointer(a.ref_state), a.beta)),
        byref(SavedMixture(pointer(a.grad_jsd), pointer(a.mixture_kl), a.temperature)),
        byref(GradLogits.of(a.grad_logits)),
    )


def backward(a: TokenStatsBackwardArgs | TokenKLBackwardArgs) -> None:
    policy, reference = models(a)
    pointers = {name: pointer(getattr(a, name, None)) for name in SAVED}
    assert not library().host_backward(
        byref(Rows.of(a.logits, a.token_ids, a.mask)),
        byref(policy),
        byref(reference),
        byref(Saved(**pointers, temperature=a.temperature, part=a.part)),
        byref(GradLogits.of(a.grad_logits)),
    )


token_stats_backward = token_kl_backward = backward


def policy_loss(a: PolicyLossArgs) -> Tensor:
    policy, reference = models(a)
    params = PolicyLossParams(
        clip_low=a.clip_low,
        clip_high=a.clip_high,
        dual_clip=or_infinity(a.dual_clip),
        log_ratio_clamp=or_infinity(a.log_ratio_clamp),
        kl_coef=a.kl_coef,
        entropy_coef=a.entropy_coef,
        estimator=a.kl_estimator,
    )
    terms = torch.empty((len(POLICY_LOSS_TERMS), *a.token_ids.shape))
    assert not library().host_policy_loss(
        byref(Rows.of(a.logits, a.token_ids, a.mask)),
        byref(policy),
        byref(reference),
        byref(PolicyLossTokens(*(pointer(getattr(a, name)) for name in TOKENS))),
        byref(params),
        c_double(a.temperature),
        byref(GradLogits.of(a.grad_logits)),
        c_void_p(terms.data_ptr()),
    )
    return terms


def scale_gradient(a: ScaleGradientArgs) -> None:
    assert not library().host_scale(
        byref(Rows.of(a.gradient, None, None)),
        byref(GradLogits.of(a.gradient)),
        c_int(DTYPES[a.gradient.dtype]),
        c_void_p(a.factor.data_ptr()),
    )


def gae(a: GAEArgs) -> GAEOutputs:
    n_batch, n_tokens = a.rewards.shape
    if a.cu_seqlens is not None:
        n_batch = len(a.cu_seqlens) - 1
    out = GAEOutputs(torch.empty_like(a.rewards), torch.empty_like(a.rewards))
    assert not library().host_gae(
        *(c_void_p(pointer(t)) for t in (a.rewards, a.values, a.mask)),
        c_int64(n_batch),
        c_int64(n_tokens),
        c_double(a.gamma),
        c_double(a.lam),
        c_bool(a.skip_masked),
        c_void_p(pointer(a.cu_seqlens)),
        *(c_void_p(pointer(t)) for t in out),
    )
    return out


def backend(device: tuple[int, int, int] = H200) -> SimpleNamespace:
    """The operators of `schemas.OPERATORS`, of kernels.cpp."""
    run_as(device)
    operators = {name: globals()[name] for name in OPERATORS}
    return SimpleNamespace(**operators)
