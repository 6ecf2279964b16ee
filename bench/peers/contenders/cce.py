"""Cut Cross-Entropy: the log-probability from hidden states, without logits."""

from __future__ import annotations

from bench.peers.contenders import Call, need_cuda, offers
from bench.peers.operations import HeadInputs, Results

NAME = "cut-cross-entropy"
NOTE = "log-probability only"


@offers("linear logprob + entropy", name=NAME, rounds=True, note=NOTE)
def kernel() -> Call:
    need_cuda(NAME)
    return _logprob("cce")


@offers("linear logprob + entropy", name=f"{NAME} (torch.compile)", rounds=True, note=NOTE)
def compiled() -> Call:
    return _logprob("torch_compile")


def _logprob(implementation: str) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    def run(x: HeadInputs) -> Results:
        # filter_eps=None: no small gradients are left out, as in all other contenders.
        loss = linear_cross_entropy(
            x.hidden, x.weight, x.token_ids, reduction="none", filter_eps=None, impl=implementation
        )
        return {"logprob": -loss}

    return run
