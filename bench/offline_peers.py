"""Calls of other libraries, whose host code launches the kernels that are to be counted.

Every call has logits of 8192 rows and 128256 columns in bfloat16, without memory. A library is
imported as it is; where that needs packages that have nothing to do with its kernels, the file with
the kernels is loaded by its path, and stand-ins are listed with it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from offline_jobs import BACKWARD, KL, LOGPROB, ROWS, VOCAB_SIZE
from offline_launches import Context, forward_and_backward

WIDTH = 4096  # of hidden states, where logits are made by the library itself
CPU_ROWS = 16  # real ones, where host code looks at values; a multiple of 16 as ROWS is


@dataclass(frozen=True)
class Counted:
    """One kernel of a call: what it is for, and how its code is to be read."""

    name: str  # to be shown
    job: str  # of JOBS
    computes: str
    loops: tuple[str, ...]  # in program order; none: a program is one tile, without a loop
    block: str = "BLOCK_SIZE"  # constant with the logits of a tile
    unit: str = "logit"
    unit_bytes: int = 2  # read per unit; a pair of bfloat16 logits has 4
    notes: str = ""


@dataclass(frozen=True)
class Call:
    library: str  # its distribution
    make: Callable[[], object]
    kernels: dict[str, Counted]
    meta: bool = True
    stand_ins: str = ""  # for what is not the library's own


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, device="cuda", dtype=dtype)


def like(out: Any) -> tuple[torch.Tensor, ...]:
    return tuple(torch.empty_like(t) for t in (out if isinstance(out, tuple) else (out,)))


def trl_logprob_entropy() -> None:
    from trl.kernels.logprob_entropy import _LogProbEntropyFunction as function

    inputs = empty(ROWS, VOCAB_SIZE), empty(ROWS, dtype=torch.int64), 1.0, None
    forward_and_backward(function, *inputs, grads=like)


def trl_divergence() -> None:
    stub = types.ModuleType("trl.trainer.utils")
    stub.maybe_gather_lm_head_ctx = lambda *_: contextlib.nullcontext()  # type: ignore[attr-defined]
    sys.modules.setdefault("trl.trainer.utils", stub)
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as function

    model = empty(ROWS, WIDTH), empty(VOCAB_SIZE, WIDTH), None
    forward_and_backward(function, *model, *model, 1.0, grads=like)


def trl_chunked_logprob() -> None:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction as function

    model = empty(ROWS, WIDTH), empty(VOCAB_SIZE, WIDTH), None
    outputs = ("entropy",)
    ids = empty(ROWS, dtype=torch.int64)
    function.forward(Context(), *model, ids, 1.0, 32768, outputs=outputs)


def liger_cross_entropy() -> None:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction as function

    logits = torch.zeros(CPU_ROWS, VOCAB_SIZE, dtype=torch.bfloat16, requires_grad=True)
    function.forward(Context(), logits, torch.zeros(CPU_ROWS, dtype=torch.int64), None)


def liger_selective_log_softmax() -> None:
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    fused_selective_log_softmax(empty(8, 1025, VOCAB_SIZE), empty(8, 1024, dtype=torch.int64))


def liger_grpo() -> None:
    from liger_kernel.ops.grpo_loss import GrpoLossFunction as function

    per_token = empty(8, 1024, dtype=torch.float32)
    logits, ids = empty(8, 1025, VOCAB_SIZE), empty(8, 1024, dtype=torch.int64)
    advantages = empty(8, dtype=torch.float32)
    forward_and_backward(
        function, logits, per_token, per_token, ids, advantages, None, 0.9, 0.1, 0.2, 0.2, True,
        "grpo", None, False, grads=lambda out: (torch.empty_like(out[0]), None, None),
    )  # fmt: skip


def liger_kl() -> None:
    from liger_kernel.ops.kl_div import LigerKLDivLossFunction as function

    log_p, log_q = empty(ROWS, VOCAB_SIZE), empty(ROWS, VOCAB_SIZE)
    function.forward(Context(), log_p, log_q, "batchmean", True)


def liger_jsd() -> None:
    from liger_kernel.ops.jsd import jsd_forward

    log_p, log_q = empty(ROWS, VOCAB_SIZE), empty(ROWS, VOCAB_SIZE)
    jsd_forward(log_p, log_q, None, 1.0, -100, False, jsd_impl="triton")


def fla_kl() -> None:
    from fla.modules.fused_kl_div.ops import fused_kl_div_fwd

    models = empty(ROWS, WIDTH), empty(ROWS, WIDTH), empty(VOCAB_SIZE, WIDTH)
    fused_kl_div_fwd(*models, empty(VOCAB_SIZE, WIDTH), use_dx=False, use_dw=False)


def fla_cross_entropy() -> None:
    from fla.modules.fused_cross_entropy.ops import cross_entropy_bwd, cross_entropy_fwd

    logits, target = empty(ROWS, VOCAB_SIZE), empty(ROWS, dtype=torch.int64)
    loss, _, lse, *_ = cross_entropy_fwd(logits, target)
    cross_entropy_bwd(logits, target, lse, loss)


def fla_grpo() -> None:
    from fla.modules.grpo.ops import grpo_fwd_kernel

    per_token = empty(8, 1024, dtype=torch.float32)
    grpo_fwd_kernel[(ROWS,)](
        logits_ptr=empty(8, 1025, VOCAB_SIZE), ref_logp_ptr=per_token,
        input_ids_ptr=empty(8, 1024, dtype=torch.int64),
        advantages_ptr=empty(8, dtype=torch.float32),
        completion_mask_ptr=empty(8, 1024, dtype=torch.int32), loss_ptr=per_token,
        lse_ptr=per_token, beta=0.1, save_kl=False, B=8, M=ROWS, N=VOCAB_SIZE, L=1024, start_idx=0,
    )  # fmt: skip


FLASH_ATTENTION = "sources/flash_attn/ops/triton/cross_entropy.py"


def on_path(name: str) -> Path:
    for folder in sys.path:
        if Path(folder, name).is_file():
            return Path(folder, name)
    raise ModuleNotFoundError(f"no {name} on PYTHONPATH")


def by_path(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flash_attention_cross_entropy() -> None:
    function = by_path("flash_attention_cross_entropy", on_path(FLASH_ATTENTION)).CrossEntropyLoss
    inputs = empty(ROWS, VOCAB_SIZE), empty(ROWS, dtype=torch.int64)
    forward_and_backward(function, *inputs, grads=like)


def unsloth_cross_entropy() -> None:
    import triton.language as tl

    def module(name: str, **names: Any) -> None:
        made = types.ModuleType(name)
        vars(made).update(names)
        sys.modules[name] = made

    path = on_path("unsloth/kernels/cross_entropy_loss.py")
    module("peer_unsloth", __path__=[str(path.parent)])
    module(
        "peer_unsloth.utils", calculate_settings=None, MAX_FUSED_SIZE=65536, is_cdna=lambda: False,
        triton_tanh=tl.extra.cuda.libdevice.tanh, triton_cast=tl.cast,
        torch_gpu_device=torch.cuda.device,
    )  # fmt: skip
    module("peer_unsloth.rope_embedding", _eviction_hints_ok=lambda _: True)
    module("transformers.models.llama.modeling_llama", logger=None)
    module("unsloth_zoo", __path__=[])
    module("unsloth_zoo.utils", Version=str)
    module(
        "unsloth_zoo.loss_utils", patch_loss_functions=None, post_patch_loss_function=lambda f: f
    )
    function = by_path("peer_unsloth.cross_entropy_loss", path).Fast_CrossEntropyLoss
    inputs = empty(ROWS, VOCAB_SIZE), empty(ROWS, dtype=torch.int64)
    forward_and_backward(function, *inputs, grads=like)


def version(library: str) -> str:
    if library == "flash-attn":  # its file alone: an installation would build CUDA sources
        text = on_path("sources/flash_attn/__init__.py").read_text()
        return re.findall(r'__version__ = "([^"]+)"', text)[0]
    return importlib.metadata.version(library)


ONE = ("statistics",)

CALLS = [
    Call(
        "trl",
        trl_logprob_entropy,
        {
            "_forward_kernel": Counted(
                "TRL logprob + entropy", LOGPROB, "log-probability, entropy", ONE
            ),
            "_backward_kernel": Counted(
                "TRL logprob + entropy", BACKWARD, "of log-probability and entropy", ()
            ),
        },
    ),
    Call(
        "trl",
        trl_chunked_logprob,
        {
            "_forward_kernel": Counted(
                "TRL chunked logprob", LOGPROB, "log-probability, entropy", ONE,
                notes="tiles of 32768 logits that a matrix product wrote",
            ),
        },
    ),
    Call(
        "trl",
        trl_divergence,
        {
            "_stats_kernel": Counted(
                "TRL chunked divergence", KL, "both KLs, entropy", ONE, unit="pair", unit_bytes=8,
                notes="float32 tiles of 32768 logits that a matrix product wrote",
            ),
            "_backward_kernel": Counted(
                "TRL chunked divergence", BACKWARD, "of reverse KL", (), unit="pair", unit_bytes=8,
                notes="float32 tiles, in place",
            ),
        },
        stand_ins="trl.trainer.utils.maybe_gather_lm_head_ctx, which does nothing here",
    ),
    Call(
        "liger-kernel",
        liger_selective_log_softmax,
        {
            "_selective_log_softmax_kernel": Counted(
                "Liger selective_log_softmax", LOGPROB, "log-probability", ONE, "BLOCK_N"
            )
        },
    ),
    Call(
        "liger-kernel",
        liger_grpo,
        {
            "_grpo_loss_fwd_kernel": Counted(
                "Liger GRPO", LOGPROB, "GRPO loss per token", ONE, "BLOCK_N"
            ),
            "_grpo_loss_bwd_kernel": Counted(
                "Liger GRPO", BACKWARD, "of GRPO loss", ("gradient",), "BLOCK_N"
            ),
        },
    ),
    Call(
        "liger-kernel",
        liger_cross_entropy,
        {
            "liger_cross_entropy_kernel": Counted(
                "Liger cross-entropy", BACKWARD, "cross-entropy and its gradient",
                ("statistics", "gradient"),
            )
        },
        meta=False,
    ),
    Call(
        "liger-kernel",
        liger_kl,
        {
            "_kldiv_kernel_forward": Counted(
                "Liger KL", KL, "forward KL, from ready log-probabilities", ("sum",),
                unit="pair", unit_bytes=4, notes="a log-softmax of each tensor comes before it",
            )
        },
    ),
    Call(
        "liger-kernel",
        liger_jsd,
        {
            "_jsd_kernel": Counted(
                "Liger JSD", KL,
                "reverse KL and its gradient, from ready log-probabilities", ("sum",),
                unit="pair", unit_bytes=4, notes="a log-softmax of each tensor comes before it",
            )
        },
    ),
    Call(
        "flash-attn",
        flash_attention_cross_entropy,
        {
            "cross_entropy_fwd_kernel": Counted(
                "flash-attention cross-entropy", LOGPROB, "log-probability", ONE
            ),
            "cross_entropy_bwd_kernel": Counted(
                "flash-attention cross-entropy", BACKWARD, "of log-probability", ()
            ),
        },
        stand_ins="loaded by its path",
    ),
    Call(
        "fla-core",
        fla_cross_entropy,
        {
            "cross_entropy_fwd_kernel": Counted(
                "fla cross-entropy", LOGPROB, "log-probability", (), "BV",
                notes="two tiles a row, merged by another kernel",
            ),
            "cross_entropy_bwd_kernel": Counted(
                "fla cross-entropy", BACKWARD, "of log-probability", (), "BV"
            ),
        },
    ),
    Call(
        "fla-core",
        fla_grpo,
        {"grpo_fwd_kernel": Counted("fla GRPO", LOGPROB, "GRPO loss per token", ONE)},
    ),
    Call(
        "fla-core",
        fla_kl,
        {
            "kl_div_kernel": Counted(
                "fla fused KL", KL, "forward KL and its gradient", ("statistics", "gradient"), "BV",
                unit="pair", unit_bytes=4, notes="chunks of logits that a matrix product wrote",
            )
        },
    ),
    Call(
        "unsloth",
        unsloth_cross_entropy,
        {
            "_chunked_cross_entropy_forward": Counted(
                "unsloth cross-entropy", LOGPROB, "log-probability", (),
                notes="two tiles a row, merged by torch",
            ),
            "_cross_entropy_backward": Counted(
                "unsloth cross-entropy", BACKWARD, "of log-probability", ()
            ),
        },
        stand_ins="loaded by its path; stand-ins for its imports: Triton's own cast and tanh, "
        "MAX_FUSED_SIZE = 65536, no AMD, and what patches transformers",
    ),
]  # fmt: skip

# Not counted per logit, and why.
LEFT_OUT = {
    "cut-cross-entropy": "its kernels make the logits by matrix products on tensor cores and read "
    "none from memory: instructions per logit would count the product",
    "verl": "the same: its Triton kernels are a linear cross-entropy with entropy",
    "quack-kernels": "written in CuTe DSL, not Triton",
    "liger-kernel, chunked losses": "PyTorch operations that torch.compile fuses: no kernels of "
    "their own",
}
