"""The CUDA kernels, compiled for the host, as one more backend."""

from __future__ import annotations

import ctypes
import functools
import math
import subprocess
import tempfile
from ctypes import byref, c_bool, c_double, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from kl_kernels.schemas import ALONE_FIELDS, MIXTURE_SUMS, POLICY_LOSS_TERMS, STATE_FIELDS

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


def compile_host(source: str, target: Path, *flags: str) -> Path:
    command = ["g++", *FLAGS, *flags, f"-I{HERE}", str(HERE / source), "-o", str(target)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, compiled once per process."""
    with tempfile.TemporaryDirectory() as directory:  # loaded, a library needs its file no more
        path = compile_host(
            "kernels.cpp", Path(directory) / "kernels.so",
            "-O1", "-fPIC", "-shared", "-DCUDA_ON_HOST_FIBERS",
        )  # fmt: skip
        loaded = ctypes.CDLL(str(path))
    loaded.host_scratch_bytes.restype = loaded.host_mix_scratch_bytes.restype = c_int64
    return loaded


# The structs of csrc/cuda/operators.h.


class Logits(ctypes.Structure):
    _fields_ = [
        ("data", c_void_p), ("dtype", c_int), ("stride_b", c_int64), ("stride_t", c_int64),
        ("k", c_float), ("softcap", c_float),
    ]  # fmt: skip

    @classmethod
    def of(cls, logits: Tensor, temperature: float, softcap: float | None) -> Logits:
        assert logits.stride(2) == 1 or logits.shape[2] == 1
        k = 1 / math.log(2) / temperature
        return cls(
            logits.data_ptr(), DTYPES[logits.dtype], logits.stride(0), logits.stride(1),
            k, softcap or 0.0,
        )  # fmt: skip


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
        ("n_rows", c_int64), ("n_tokens", c_int64), ("vocab_size", c_int64),
        ("token_ids", c_void_p), ("mask", c_void_p),
    ]  # fmt: skip

    @classmethod
    def of(cls, logits: Tensor, token_ids: Tensor | None, mask: Tensor | None) -> Rows:
        n_batch, n_tokens, vocab_size = logits.shape
        return cls(n_batch * n_tokens, n_tokens, vocab_size, pointer(token_ids), pointer(mask))


OUTPUTS = ("logprob", "ref_logprob", "kl", "forward_kl", "entropy")
STATES = ("policy_state", "ref_state")
REWARDS = ("rewards", "advantage_correction")


class Outputs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in (*OUTPUTS, *STATES, *REWARDS, "part_state")]


class RewardShape(ctypes.Structure):
    _fields_ = [
        ("scores", c_void_p), ("score_index", c_void_p), ("kl_coef", c_float),
        ("estimator", c_int), ("kl_clip", c_float),
    ]  # fmt: skip


class Saved(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("grad_logprob", "grad_kl", "grad_forward_kl")),
        *((name, c_void_p) for name in ("grad_entropy", *STATES, "kl", "entropy")),
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


class PolicyLossShape(ctypes.Structure):
    _fields_ = [
        *((name, c_float) for name in ("clip_low", "clip_high", "dual_clip", "log_ratio_clamp")),
        ("kl_coef", c_float), ("entropy_coef", c_float), ("estimator", c_int),
    ]  # fmt: skip


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
    """Over how many blocks the kernels for a GPU keep a row; 0: it is read again."""
    return library().host_blocks_per_row(
        c_int64(vocab_size), c_bool(dtype == torch.float32), c_bool(with_reference)
    )


def backend(device: tuple[int, int, int] = H200) -> SimpleNamespace:
    """The operators of `schemas.KERNELS`, of kernels.cpp."""
    run_as(device)

    def forward(logits, policy, reference, token_ids, mask, names, shape=None):
        n_batch, n_tokens, _ = logits.shape
        n_fields = len(STATE_FIELDS) if reference.data else ALONE_FIELDS
        leading = dict.fromkeys(STATES, (2,)) | {"part_state": (n_fields,)}
        tensors = {name: torch.empty(*leading.get(name, ()), n_batch, n_tokens) for name in names}
        rows = Rows.of(logits, token_ids, mask)
        scratch = torch.empty(library().host_scratch_bytes(byref(rows)), dtype=torch.uint8)
        outputs = Outputs(**{name: pointer(tensor) for name, tensor in tensors.items()})
        assert not library().host_forward(
            byref(rows), byref(policy), byref(reference), byref(outputs),
            byref(shape or RewardShape()), c_void_p(scratch.data_ptr()),
        )  # fmt: skip
        return tuple(tensors[name] for name in names)

    def fold_part(
        logits, ref_logits, token_ids, mask, temperature, ref_temperature, softcap, ref_softcap
    ):
        policy, reference = Logits.of(logits, temperature, softcap), Logits()
        if ref_logits is not None:
            reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        return forward(logits, policy, reference, token_ids, mask, ("part_state",))[0]

    def token_stats(logits, token_ids, mask, temperature, softcap):
        policy = Logits.of(logits, temperature, softcap)
        names = ("logprob", "entropy", "policy_state")
        return forward(logits, policy, Logits(), token_ids, mask, names)

    def token_kl(
        logits, ref_logits, token_ids, mask, temperature, ref_temperature, softcap, ref_softcap
    ):
        policy = Logits.of(logits, temperature, softcap)
        reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        return forward(logits, policy, reference, token_ids, mask, (*OUTPUTS, *STATES))

    def kl_rewards(
        logits, ref_logits, token_ids, mask, scores, score_index, kl_coef, estimator, kl_clip,
        temperature, ref_temperature, softcap, ref_softcap,
    ):  # fmt: skip
        policy = Logits.of(logits, temperature, softcap)
        reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        bound = math.inf if kl_clip is None else kl_clip
        shape = RewardShape(pointer(scores), pointer(score_index), kl_coef, estimator, bound)
        names = (*REWARDS, *OUTPUTS, *STATES)
        return forward(logits, policy, reference, token_ids, mask, names, shape)

    def mix(logits, policy, reference, mask, states, beta, outputs, part):
        rows = Rows.of(logits, None, mask)
        scratch = torch.empty(library().host_mix_scratch_bytes(byref(rows)), dtype=torch.uint8)
        assert not library().host_mix(
            byref(rows), byref(policy), byref(reference),
            byref(FinishedRows(*map(pointer, states), beta)),
            byref(MixtureOutputs(*map(pointer, outputs), part)), c_void_p(scratch.data_ptr()),
        )  # fmt: skip

    def token_jsd(
        logits, ref_logits, mask, beta, temperature, ref_temperature, softcap, ref_softcap
    ):
        policy = Logits.of(logits, temperature, softcap)
        reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        states = forward(logits, policy, reference, None, mask, STATES)
        outputs = torch.empty(logits.shape[:2]), torch.empty(logits.shape[:2])
        mix(logits, policy, reference, mask, states, beta, outputs, False)
        return *outputs, *states

    def mixture_part(
        logits, ref_logits, mask, policy_state, ref_state, beta, temperature, ref_temperature,
        softcap, ref_softcap,
    ):  # fmt: skip
        policy = Logits.of(logits, temperature, softcap)
        reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        sums = torch.empty(len(MIXTURE_SUMS), *logits.shape[:2])
        mix(logits, policy, reference, mask, (policy_state, ref_state), beta, sums.unbind(), True)
        return sums

    def token_jsd_backward(
        grad_jsd, logits, ref_logits, mask, policy_state, ref_state, mixture_kl, beta,
        temperature, ref_temperature, softcap, ref_softcap, grad_logits,
    ):  # fmt: skip
        assert not library().host_mix_backward(
            byref(Rows.of(logits, None, mask)), byref(Logits.of(logits, temperature, softcap)),
            byref(Logits.of(ref_logits, ref_temperature, ref_softcap)),
            byref(FinishedRows(pointer(policy_state), pointer(ref_state), beta)),
            byref(SavedMixture(pointer(grad_jsd), pointer(mixture_kl), temperature)),
            byref(GradLogits.of(grad_logits)),
        )  # fmt: skip

    def backward(
        logits, policy, reference, token_ids, mask, temperature, part, grad_logits, **saved
    ):  # fmt: skip
        pointers = {name: pointer(tensor) for name, tensor in saved.items()}
        assert not library().host_backward(
            byref(Rows.of(logits, token_ids, mask)), byref(policy), byref(reference),
            byref(Saved(**pointers, temperature=temperature, part=part)),
            byref(GradLogits.of(grad_logits)),
        )  # fmt: skip

    def token_stats_backward(
        grad_logprob, grad_entropy, logits, token_ids, mask, policy_state, entropy,
        temperature, softcap, part, grad_logits,
    ):  # fmt: skip
        policy = Logits.of(logits, temperature, softcap)
        backward(
            logits, policy, Logits(), token_ids, mask, temperature, part, grad_logits,
            grad_logprob=grad_logprob, grad_entropy=grad_entropy,
            policy_state=policy_state, entropy=entropy,
        )  # fmt: skip

    def token_kl_backward(
        grad_logprob, grad_kl, grad_forward_kl, grad_entropy, logits, ref_logits, token_ids, mask,
        policy_state, ref_state, kl, entropy, temperature, ref_temperature, softcap, ref_softcap,
        part, grad_logits,
    ):  # fmt: skip
        policy = Logits.of(logits, temperature, softcap)
        reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        backward(
            logits, policy, reference, token_ids, mask, temperature, part, grad_logits,
            grad_logprob=grad_logprob, grad_kl=grad_kl, grad_forward_kl=grad_forward_kl,
            grad_entropy=grad_entropy, policy_state=policy_state, ref_state=ref_state,
            kl=kl, entropy=entropy,
        )  # fmt: skip

    def policy_loss(
        logits, ref_logits, token_ids, mask,
        old_logprobs, advantages, token_weights, importance_weights, ref_logprobs,
        clip_low, clip_high, dual_clip, log_ratio_clamp, kl_coef, kl_estimator, entropy_coef,
        temperature, ref_temperature, softcap, ref_softcap, grad_logits,
    ):  # fmt: skip
        reference = Logits()
        if ref_logits is not None:
            reference = Logits.of(ref_logits, ref_temperature, ref_softcap)
        per_token = old_logprobs, advantages, token_weights, importance_weights, ref_logprobs
        shape = PolicyLossShape(
            clip_low, clip_high,
            *(math.inf if b is None else b for b in (dual_clip, log_ratio_clamp)),
            kl_coef, entropy_coef, kl_estimator,
        )  # fmt: skip
        terms = torch.empty((len(POLICY_LOSS_TERMS), *token_ids.shape))
        assert not library().host_policy_loss(
            byref(Rows.of(logits, token_ids, mask)), byref(Logits.of(logits, temperature, softcap)),
            byref(reference), byref(PolicyLossTokens(*map(pointer, per_token))), byref(shape),
            c_double(temperature), byref(GradLogits.of(grad_logits)), c_void_p(terms.data_ptr()),
        )  # fmt: skip
        return terms

    def scale_gradient(gradient, factor):
        assert not library().host_scale(
            byref(Rows.of(gradient, None, None)), byref(GradLogits.of(gradient)),
            c_int(DTYPES[gradient.dtype]), c_void_p(factor.data_ptr()),
        )  # fmt: skip

    def gae(rewards, values, mask, gamma, lam, skip_masked):
        n_batch, n_tokens = rewards.shape
        advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
        inputs = (c_void_p(pointer(t)) for t in (rewards, values, mask))
        outputs = (c_void_p(pointer(t)) for t in (advantages, returns))
        assert not library().host_gae(
            *inputs, c_int64(n_batch), c_int64(n_tokens), c_double(gamma), c_double(lam),
            c_bool(skip_masked), *outputs,
        )  # fmt: skip
        return advantages, returns

    return SimpleNamespace(
        fold_part=fold_part,
        token_stats=token_stats,
        token_stats_backward=token_stats_backward,
        token_kl=token_kl,
        token_kl_backward=token_kl_backward,
        token_jsd=token_jsd,
        mixture_part=mixture_part,
        token_jsd_backward=token_jsd_backward,
        kl_rewards=kl_rewards,
        policy_loss=policy_loss,
        scale_gradient=scale_gradient,
        gae=gae,
    )
