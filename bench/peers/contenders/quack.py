"""QuACK: CuTe kernels for cross-entropy, on Hopper and later."""

from __future__ import annotations

import torch

from bench.peers.contenders import Call, Unavailable, need_cuda, offers
from bench.peers.definitions import Results
from bench.peers.heads import HeadInputs
from bench.peers.operations import Inputs

NAME = "quack"
HOPPER = (9, 0)


def _need_hopper() -> None:
    need_cuda(NAME)
    if torch.cuda.get_device_capability() < HOPPER:
        raise Unavailable(f"{NAME}'s kernels need a Hopper GPU or a later one")


@offers("token logprob", name=f"{NAME} cross-entropy")
def logprob() -> Call:
    _need_hopper()
    from quack.cross_entropy import cross_entropy

    def run(x: Inputs) -> Results:
        logits = x.logits.flatten(0, 1)
        loss = cross_entropy(logits, x.token_ids.flatten(), reduction="none")
        return {"logprob": -loss.view_as(x.token_ids)}

    return run


@offers(
    "linear logprob + entropy",
    name=f"{NAME} linear cross-entropy",
    rounds=True,
    note="the mean log-probability only",
)
def linear_cross_entropy() -> Call:
    _need_hopper()
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    def run(x: HeadInputs) -> Results:
        loss = chunked_linear_cross_entropy(x.hidden, x.weight, x.token_ids, reduction="mean")
        return {"mean_logprob": -loss}

    return run
