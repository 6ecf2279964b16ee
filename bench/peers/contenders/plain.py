"""PyTorch's own operators, as they are and through torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from bench.peers.contenders import Call, Unavailable, offers
from bench.peers.definitions import (
    Results,
    clipped_loss,
    gae,
    grpo_loss,
    jensen_shannon,
    kl_loss,
    shaped_rewards,
    statistics,
    whiten,
)
from bench.peers.heads import HeadInputs
from bench.peers.operations import GAEInputs, Inputs

EAGER, COMPILED = "torch eager", "torch.compile"


def offers_both(*operations: str, rounds: bool = False) -> Callable[[Call], Call]:
    """A formula as it is and compiled, for the very shapes it is called with."""

    def register(formula: Call) -> Call:
        offers(*operations, name=EAGER, rounds=rounds)(lambda: formula)
        offers(*operations, name=COMPILED, rounds=rounds)(lambda: compiled(formula))
        return formula

    return register


def compiled(formula: Call) -> Call:
    torch.compiler.reset()
    return torch.compile(formula, dynamic=False)


def logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:  # [..., V], [...]
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(-1, token_ids[..., None]).squeeze(-1)


def entropies(logits: Tensor) -> Tensor:  # [..., V]
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@offers_both("token logprob")
def logprob(x: Inputs) -> Results:
    return {"logprob": logprobs(x.logits, x.token_ids)}


@offers("token logprob", name="torch cross_entropy")
def negative_cross_entropy() -> Call:
    def run(x: Inputs) -> Results:
        logits, ids = x.logits.flatten(0, 1), x.token_ids.flatten()
        loss = cross_entropy(logits.float(), ids, reduction="none")
        return {"logprob": -loss.view_as(x.token_ids)}

    return run


@offers_both("logprob + entropy")
def logprob_and_entropy(x: Inputs) -> Results:
    log_p = x.logits.float().log_softmax(-1)
    logprob = log_p.gather(-1, x.token_ids[..., None]).squeeze(-1)
    return {"logprob": logprob, "entropy": -(log_p.exp() * log_p).sum(-1)}


@offers_both("exact KL")
def token_kl(x: Inputs) -> Results:
    return statistics(x.logits.float(), x.ref_logits.float(), x.token_ids)


@offers_both("JSD")
def token_jsd(x: Inputs) -> Results:
    return jensen_shannon(x.logits.float(), x.ref_logits.float())


@offers_both("shaped reward")
def rewards(x: Inputs) -> Results:
    ref_logprob = logprobs(x.ref_logits, x.token_ids)
    return {"rewards": shaped_rewards(logprobs(x.logits, x.token_ids), ref_logprob, x.scores)}


@offers_both("policy loss")
def policy_loss(x: Inputs) -> Results:
    return {"loss": grpo_loss(logprobs(x.logits, x.token_ids), x)}


@offers_both("policy loss with exact KL")
def policy_loss_with_exact_kl(x: Inputs) -> Results:
    return {"loss": kl_loss(token_kl(x), x)}


@offers_both("linear logprob + entropy", rounds=True)
def linear_stats(x: HeadInputs) -> Results:
    log_p = linear(x.hidden, x.weight).float().log_softmax(-1)
    logprob = log_p.gather(-1, x.token_ids[..., None]).squeeze(-1)
    return {"logprob": logprob, "entropy": -(log_p.exp() * log_p).sum(-1)}


@offers_both("linear exact KL", rounds=True)
def linear_kl(x: HeadInputs) -> Results:
    logits, ref_logits = linear(x.hidden, x.weight), linear(x.ref_hidden, x.ref_weight)
    return statistics(logits.float(), ref_logits.float(), x.token_ids)


@offers_both("linear JSD", rounds=True)
def linear_jsd(x: HeadInputs) -> Results:
    logits, ref_logits = linear(x.hidden, x.weight), linear(x.ref_hidden, x.ref_weight)
    return jensen_shannon(logits.float(), ref_logits.float())


@offers_both("linear policy loss", rounds=True)
def linear_policy_loss(x: HeadInputs) -> Results:
    logits = linear(x.by_response(x.hidden), x.weight)
    return {"loss": grpo_loss(logprobs(logits, x.by_response(x.token_ids)), x)}


LINEAR_CROSS_ENTROPY = "torch linear_cross_entropy"


@offers(
    "linear logprob + entropy", name=LINEAR_CROSS_ENTROPY, rounds=True, note="log-probability only"
)
def negative_linear_cross_entropy() -> Call:
    logprob = _linear_logprob()
    return lambda x: {"logprob": logprob(x)}


@offers("linear policy loss", name=LINEAR_CROSS_ENTROPY, rounds=True)
def linear_cross_entropy_policy_loss() -> Call:
    logprob = _linear_logprob()
    return lambda x: {"loss": grpo_loss(x.by_response(logprob(x)).float(), x)}


def _linear_logprob() -> Callable[[HeadInputs], Tensor]:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if function is None:
        raise Unavailable(f"torch {torch.__version__} has no linear_cross_entropy")
    return lambda x: -function(x.hidden, x.weight, x.token_ids, reduction="none")


@offers("GAE", name="Python loop")
def gae_loop() -> Call:
    def run(x: GAEInputs) -> Results:
        return dict(zip(("advantages", "returns"), gae(x.rewards, x.values, x.mask)))

    return run


def update(logprob: Callable[..., Tensor], entropy: Callable[..., Tensor]) -> Call:
    """A PPO update as trainers have it, from the two functions that read logits.

    Log-probabilities of both models for the rewards, and those of the policy once more for the
    loss, as the model has run again by then; the entropy is a metric.
    """

    def run(x: Inputs) -> Results:
        with torch.no_grad():
            old_logprob = logprob(x.logits, x.token_ids)
            rewards = shaped_rewards(old_logprob, logprob(x.ref_logits, x.token_ids), x.scores)
            advantages, _ = gae(rewards, x.values, x.mask)
            advantages = whiten(advantages)
            mean_entropy = entropy(x.logits).mean()
        loss = clipped_loss(logprob(x.logits, x.token_ids), old_logprob, advantages).mean()
        return {"rewards": rewards, "mean_entropy": mean_entropy, "loss": loss}

    return run


@offers("PPO step", name=EAGER)
def ppo_step() -> Call:
    return update(logprobs, entropies)


@offers("PPO step", name=COMPILED)
def compiled_ppo_step() -> Call:
    return update(compiled(logprobs), torch.compile(entropies, dynamic=False))
