"""TRL: what its trainers call on logits, and its chunked linear heads.

Its losses are methods of its trainers; here they are the formulas of `operations.py` on TRL's
log-probabilities. On a GPU the same functions run TRL's Triton kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.peers.contenders import Call, offers, plain
from bench.peers.definitions import JSD_BETA, Results, grpo_loss, shaped_rewards
from bench.peers.heads import HeadInputs
from bench.peers.operations import Inputs

ON_CPU = not torch.cuda.is_available()  # no kernel there: the logits' dtype is computed in
NAME = "TRL"
VOCAB_CHUNK = 32768  # columns of the head at a time, as its trainers have it


@offers("token logprob", name=NAME, rounds=ON_CPU)
def logprob() -> Call:
    from trl.trainer.utils import selective_log_softmax

    return lambda x: {"logprob": selective_log_softmax(x.logits, x.token_ids)}


@offers("logprob + entropy", name=NAME, rounds=ON_CPU)
def logprob_and_entropy() -> Call:
    from trl.trainer.utils import selective_log_softmax_and_entropy

    names = ("logprob", "entropy")
    return lambda x: dict(zip(names, selective_log_softmax_and_entropy(x.logits, x.token_ids)))


@offers("JSD", name=NAME, note="the mean only")
def jensen_shannon() -> Call:
    from trl.experimental.gkd import GKDTrainer

    def run(x: Inputs) -> Results:
        logits, ref_logits = x.logits.float(), x.ref_logits.float()  # as under autocast
        total = GKDTrainer.generalized_jsd_loss(logits, ref_logits, beta=JSD_BETA, reduction="sum")
        return {"mean_jsd": total / x.token_ids.numel()}

    return run


@offers("shaped reward", name=NAME, rounds=ON_CPU)
def rewards() -> Call:
    from trl.trainer.utils import selective_log_softmax

    def run(x: Inputs) -> Results:
        logprob, ref_logprob = (
            selective_log_softmax(logits, x.token_ids).float()
            for logits in (x.logits, x.ref_logits)
        )
        return {"rewards": shaped_rewards(logprob, ref_logprob, x.scores)}

    return run


@offers("policy loss", name=NAME, rounds=ON_CPU)
def policy_loss() -> Call:
    from trl.trainer.utils import selective_log_softmax

    return lambda x: {"loss": grpo_loss(selective_log_softmax(x.logits, x.token_ids), x)}


@offers("PPO step", name=NAME, rounds=ON_CPU)
def ppo_step() -> Call:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    def logprob(logits: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
        return selective_log_softmax(logits, token_ids).float()

    return plain.update(logprob, entropy_from_logits)


@offers("linear logprob + entropy", name=f"{NAME} chunked", rounds=True)
def linear_stats() -> Call:
    head = _chunked_head()
    return lambda x: dict(zip(("logprob", "entropy"), head(x)))


@offers("linear policy loss", name=f"{NAME} chunked", rounds=True)
def linear_policy_loss() -> Call:
    head = _chunked_head()  # the entropy is a metric of GRPOTrainer's
    return lambda x: {"loss": grpo_loss(x.by_response(head(x)[0]), x)}


def _chunked_head() -> Callable[[HeadInputs], tuple[torch.Tensor, ...]]:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return lambda x: ChunkedLogProbFunction.apply(
        x.hidden, x.weight, None, x.token_ids, 1.0, VOCAB_CHUNK, None, 1.0, ("entropy",)
    )[:2]


@offers(
    "linear exact KL",
    name=f"{NAME} chunked",
    rounds=True,
    constant=("entropy",),
    note="KL and entropy only, no gradient of the entropy",
)
def linear_kl() -> Call:
    head = _divergence(1.0)
    return lambda x: dict(zip(("kl", "entropy"), head(x)))


@offers("linear JSD", name=f"{NAME} chunked", rounds=True)
def linear_jsd() -> Call:
    head = _divergence(JSD_BETA)
    return lambda x: {"jsd": head(x)[0]}


def _divergence(beta: float) -> Callable[[HeadInputs], tuple[torch.Tensor, ...]]:
    """1: KL(policy || reference)."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    return lambda x: ChunkedDivergenceFunction.apply(
        x.hidden, x.weight, None, x.ref_hidden, x.ref_weight, None, beta
    )
