"""flash-linear-attention: KL of two linear heads with gradients, and cross-entropy."""

from __future__ import annotations

from bench.peers.contenders import Call, need_cuda, offers
from bench.peers.definitions import Results
from bench.peers.heads import HeadInputs
from bench.peers.operations import Inputs

NAME = "flash-linear-attention"


@offers("token logprob", name=f"{NAME} cross-entropy", rounds=True)
def logprob() -> Call:
    need_cuda(NAME)
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    def run(x: Inputs) -> Results:
        logits = x.logits.flatten(0, 1)
        loss, _ = cross_entropy_loss(logits, x.token_ids.flatten(), inplace_backward=False)
        return {"logprob": -loss.view_as(x.token_ids)}

    return run


@offers("linear exact KL", name=NAME, rounds=True, note="the mean KL(reference || policy) only")
def linear_kl() -> Call:
    need_cuda(NAME)
    from fla.modules.fused_kl_div import fused_kl_div_loss

    def run(x: HeadInputs) -> Results:
        loss = fused_kl_div_loss(x.hidden, x.ref_hidden, x.weight, x.ref_weight)
        return {"mean_forward_kl": loss}

    return run
