"""Cut Cross-Entropy: the log-probability from hidden states, without logits."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from bench.peers.contenders import Call, need_cuda, offers
from bench.peers.definitions import grpo_loss
from bench.peers.heads import HeadInputs

NAME = "cut-cross-entropy"
NOTE = "log-probability only"


@offers("linear logprob + entropy", name=NAME, rounds=True, note=NOTE)
def kernel() -> Call:
    need_cuda(NAME)
    return _logprob("cce")


@offers("linear logprob + entropy", name=f"{NAME} (torch.compile)", rounds=True, note=NOTE)
def compiled() -> Call:
    return _logprob("torch_compile")


@offers("linear policy loss", name=NAME, rounds=True)
def policy_loss() -> Call:
    need_cuda(NAME)
    return _policy_loss("cce")


@offers("linear policy loss", name=f"{NAME} (torch.compile)", rounds=True)
def compiled_policy_loss() -> Call:
    return _policy_loss("torch_compile")


def _logprob(implementation: str) -> Call:
    head = _head(implementation)
    return lambda x: {"logprob": head(x)}


def _policy_loss(implementation: str) -> Call:
    head = _head(implementation)
    return lambda x: {"loss": grpo_loss(x.by_response(head(x)).float(), x)}


def _head(implementation: str) -> Callable[[HeadInputs], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    # filter_eps=None: no small gradients are left out, as in all other contenders.
    return lambda x: (
        -linear_cross_entropy(
            x.hidden, x.weight, x.token_ids, reduction="none", filter_eps=None, impl=implementation
        )
    )
