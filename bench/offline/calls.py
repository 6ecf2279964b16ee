"""Calls of other libraries, whose host code launches the kernels that are to be counted.

Every call has logits of 8192 rows and 128256 columns in bfloat16, without memory. A library is
imported as it is; where that needs packages that have nothing to do with its kernels, the file with
the kernels is loaded by its path, with stand-ins for what it imports.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch

from bench.offline.jobs import ROWS, VOCAB_SIZE
from bench.offline.launches import Context, forward_and_backward

WIDTH = 4096  # size of hidden states, where the library itself makes the logits
CPU_ROWS = 16  # real ones, where host code looks at values; a multiple of 16 as ROWS is


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
        logits_ptr=empty(8, 1025, VOCAB_SIZE),
        ref_logp_ptr=per_token,
        input_ids_ptr=empty(8, 1024, dtype=torch.int64),
        advantages_ptr=empty(8, dtype=torch.float32),
        completion_mask_ptr=empty(8, 1024, dtype=torch.int32),
        loss_ptr=per_token,
        lse_ptr=per_token,
        beta=0.1,
        save_kl=False,
        B=8,
        M=ROWS,
        N=VOCAB_SIZE,
        L=1024,
        start_idx=0,
    )


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
        "peer_unsloth.utils",
        calculate_settings=None,
        MAX_FUSED_SIZE=65536,
        is_cdna=lambda: False,
        triton_tanh=tl.extra.cuda.libdevice.tanh,
        triton_cast=tl.cast,
        torch_gpu_device=torch.cuda.device,
    )
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
