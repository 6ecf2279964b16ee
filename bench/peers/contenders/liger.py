"""Liger: Triton kernels for cross-entropy, GRPO, KL and JSD, and linear heads.

`kl_div` and `jsd` start from log-probabilities, so a log_softmax of both models' logits is part of
what is timed. Cross-entropy writes its gradient over the logits in its forward pass, so it gets
logits of its own.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.contenders import Call, need_cuda, offers
from bench.peers.definitions import CLIP, JSD_BETA, LOSS_KL_COEF, Results
from bench.peers.heads import HeadInputs
from bench.peers.operations import Inputs

NAME = "Liger"


@offers(
    "token logprob",
    name=f"{NAME} cross-entropy",
    rounds=True,
    source="overwritten",
    note="the loss has the logits' dtype; the gradient is written over the logits",
)
def logprob() -> Call:
    need_cuda(NAME)
    from liger_kernel.transformers.functional import liger_cross_entropy

    def run(x: Inputs) -> Results:
        logits = x.overwritten.view(-1, x.logits.shape[-1])
        loss = liger_cross_entropy(logits, x.token_ids.flatten(), reduction="none")
        return {"logprob": -loss.view_as(x.token_ids)}

    return run


@offers("JSD", name=NAME, note="the mean only")
def jensen_shannon() -> Call:
    need_cuda(NAME)
    from liger_kernel.transformers.functional import liger_jsd

    def run(x: Inputs) -> Results:
        return {"mean_jsd": liger_jsd(*_log_softmax(x), beta=JSD_BETA)}

    return run


@offers("exact KL", name=f"{NAME} JSD", note="the mean KL(policy || reference) only")
def jsd() -> Call:
    need_cuda(NAME)
    from liger_kernel.transformers.functional import liger_jsd

    reverse = 1.0

    def run(x: Inputs) -> Results:
        log_p, log_q = _log_softmax(x)
        return {"mean_kl": liger_jsd(log_p, log_q, beta=reverse)}

    return run


@offers("exact KL", name=f"{NAME} KL", note="the mean KL(reference || policy) only")
def kl_div() -> Call:
    need_cuda(NAME)
    from liger_kernel.transformers.functional import liger_kl_div

    def run(x: Inputs) -> Results:
        log_p, log_q = _log_softmax(x)
        return {
            "mean_forward_kl": liger_kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        }

    return run


def _log_softmax(x: Inputs) -> tuple:  # float32 [B T, V] each
    return tuple(t.flatten(0, 1).float().log_softmax(-1) for t in (x.logits, x.ref_logits))


@offers("policy loss", name=f"{NAME} GRPO", source="with_prompt")
def policy_loss() -> Call:
    need_cuda(NAME)
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def run(x: Inputs) -> Results:
        loss, _ = triton_grpo_loss(
            x.with_prompt,
            x.old_logprobs,
            x.ref_logprobs,
            x.token_ids,
            x.advantages,
            temperature=1.0,
            beta=LOSS_KL_COEF,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=False,
            loss_type="bnpo",
            reduce=True,
        )
        return {"loss": loss}

    return run


@offers(
    "linear logprob + entropy",
    name=f"{NAME} fused linear",
    rounds=True,
    note="in chunks of torch operators where the GPU is not a Hopper",
)
def linear_stats() -> Call:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    ignore_index, m_tiles, with_entropy = -100, 1, True

    def run(x: HeadInputs) -> Results:
        loss, entropy = LigerFusedLinearScaledCrossEntropyFunction.apply(
            x.hidden, x.weight, x.token_ids, 1.0, ignore_index, m_tiles, with_entropy
        )
        return {"logprob": -loss, "entropy": entropy}

    return run


@offers(
    "linear logprob + entropy",
    name=f"{NAME} fused linear cross-entropy",
    rounds=True,
    note="the mean log-probability only",
)
def linear_cross_entropy() -> Call:
    need_cuda(NAME)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def run(x: HeadInputs) -> Results:
        return {"mean_logprob": -liger_fused_linear_cross_entropy(x.hidden, x.weight, x.token_ids)}

    return run


@offers("linear policy loss", name=f"{NAME} fused linear GRPO", rounds=True)
def linear_policy_loss() -> Call:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss_of = LigerFusedLinearGRPOLoss(
        beta=LOSS_KL_COEF, epsilon_low=CLIP, epsilon_high=CLIP, loss_type="bnpo"
    )

    def run(x: HeadInputs) -> Results:
        loss, _ = loss_of(
            x.by_response(x.hidden),
            x.weight,
            x.by_response(x.token_ids),
            x.mask.float(),
            x.advantages,
            ref_per_token_logps=x.ref_logprobs,
            old_per_token_logps=x.old_logprobs,
        )
        return {"loss": loss}

    return run


@offers(
    "linear exact KL",
    name=f"{NAME} fused linear JSD",
    rounds=True,
    note="the mean KL(policy || reference) only",
)
def linear_jsd() -> Call:
    head = _fused_linear_jsd(1.0)
    return lambda x: {"mean_kl": head(x)}


@offers("linear JSD", name=f"{NAME} fused linear JSD", rounds=True, note="the mean only")
def mean_linear_jsd() -> Call:
    head = _fused_linear_jsd(JSD_BETA)
    return lambda x: {"mean_jsd": head(x)}


def _fused_linear_jsd(beta: float) -> Callable[[HeadInputs], Tensor]:
    """1: KL(policy || reference)."""
    need_cuda(NAME)
    from liger_kernel.transformers.functional import liger_fused_linear_jsd

    return lambda x: liger_fused_linear_jsd(
        x.hidden, x.weight, x.ref_hidden, x.ref_weight, jsd_beta=beta
    )
