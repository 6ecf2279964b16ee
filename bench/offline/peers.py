"""The kernels of other libraries that are counted, what they compute, and what is left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bench.offline import calls as offline_calls
from bench.offline.jobs import BACKWARD, KL, LOGPROB


@dataclass(frozen=True)
class Counted:
    """One kernel of a call, its job, and how to read its code."""

    name: str  # to be shown
    job: str  # a name of JOBS
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
    stand_ins: str = ""  # the code that is replaced or loaded by its path


ONE = ("statistics",)

CALLS = [
    Call(
        "trl",
        offline_calls.trl_logprob_entropy,
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
        offline_calls.trl_chunked_logprob,
        {
            "_forward_kernel": Counted(
                "TRL chunked logprob", LOGPROB, "log-probability, entropy", ONE,
                notes="tiles of 32768 logits that a matrix product wrote",
            ),
        },
    ),
    Call(
        "trl",
        offline_calls.trl_divergence,
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
        offline_calls.liger_selective_log_softmax,
        {
            "_selective_log_softmax_kernel": Counted(
                "Liger selective_log_softmax", LOGPROB, "log-probability", ONE, "BLOCK_N"
            )
        },
    ),
    Call(
        "liger-kernel",
        offline_calls.liger_grpo,
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
        offline_calls.liger_cross_entropy,
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
        offline_calls.liger_kl,
        {
            "_kldiv_kernel_forward": Counted(
                "Liger KL", KL, "forward KL, from ready log-probabilities", ("sum",),
                unit="pair", unit_bytes=4, notes="a log-softmax of each tensor comes before it",
            )
        },
    ),
    Call(
        "liger-kernel",
        offline_calls.liger_jsd,
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
        offline_calls.flash_attention_cross_entropy,
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
        offline_calls.fla_cross_entropy,
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
        offline_calls.fla_grpo,
        {"grpo_fwd_kernel": Counted("fla GRPO", LOGPROB, "GRPO loss per token", ONE)},
    ),
    Call(
        "fla-core",
        offline_calls.fla_kl,
        {
            "kl_div_kernel": Counted(
                "fla fused KL", KL, "forward KL and its gradient", ("statistics", "gradient"), "BV",
                unit="pair", unit_bytes=4, notes="chunks of logits that a matrix product wrote",
            )
        },
    ),
    Call(
        "unsloth",
        offline_calls.unsloth_cross_entropy,
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

# Packages that are not counted per logit, and the reasons.
LEFT_OUT = {
    "cut-cross-entropy": "its kernels make the logits by matrix products on tensor cores and read "
    "none from memory: instructions per logit would count the product",
    "verl": "the same: its Triton kernels are a linear cross-entropy with entropy",
    "quack-kernels": "written in CuTe DSL, not Triton",
    "liger-kernel, chunked losses": "PyTorch operations that torch.compile fuses: no kernels of "
    "their own",
}
