"""verl: its log-probabilities, rewards, GAE, losses, and linear heads for PPO."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers.contenders import Call, need_cuda, offers
from bench.peers.definitions import CLIP, GAMMA, KL_COEF, LAM, LOSS_KL_COEF, Results
from bench.peers.heads import HeadInputs
from bench.peers.operations import GAEInputs, Inputs

NAME = "verl"


@offers("token logprob", name=NAME, rounds=True)
def logprob() -> Call:
    logprobs = _logprobs()
    return lambda x: {"logprob": logprobs(x.logits, x.token_ids)}


@offers("logprob + entropy", name=NAME, rounds=True)
def logprob_and_entropy() -> Call:
    from verl.utils.torch_functional import entropy_from_logits

    logprobs = _logprobs()
    return lambda x: {
        "logprob": logprobs(x.logits, x.token_ids),
        "entropy": entropy_from_logits(x.logits),
    }


@offers("shaped reward", name=NAME, rounds=True)
def rewards() -> Call:
    from verl.trainer.ppo.core_algos import compute_rewards

    logprobs = _logprobs()

    def run(x: Inputs) -> Results:
        logprob, ref_logprob = (
            logprobs(logits, x.token_ids).float() for logits in (x.logits, x.ref_logits)
        )
        return {"rewards": compute_rewards(_token_scores(x), logprob, ref_logprob, KL_COEF)}

    return run


@offers("policy loss", name=NAME, rounds=True)
def policy_loss() -> Call:
    logprobs, loss = _logprobs(), _grpo_loss()
    return lambda x: {"loss": loss(logprobs(x.logits, x.token_ids), x)}


@offers("GAE", name=NAME, note="its advantages are whitened")
def gae() -> Call:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    def run(x: GAEInputs) -> Results:
        advantages, returns = compute_gae_advantage_return(
            x.rewards, x.values, x.mask.to(x.rewards.dtype), GAMMA, LAM
        )
        return {"whitened": advantages, "returns": returns}

    return run


@offers("PPO step", name=NAME, rounds=True)
def ppo_step() -> Call:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return, compute_rewards
    from verl.utils.torch_functional import entropy_from_logits

    logprobs, clipped_loss = _logprobs(), _clipped_loss()

    def run(x: Inputs) -> Results:
        mask = x.mask.float()
        with torch.no_grad():
            old_logprob, ref_logprob = (
                logprobs(logits, x.token_ids).float() for logits in (x.logits, x.ref_logits)
            )
            rewards = compute_rewards(_token_scores(x), old_logprob, ref_logprob, KL_COEF)
            advantages, _ = compute_gae_advantage_return(rewards, x.values, mask, GAMMA, LAM)
            mean_entropy = entropy_from_logits(x.logits).mean()
        logprob = logprobs(x.logits, x.token_ids).float()
        loss = clipped_loss(old_logprob, logprob, advantages, mask)
        return {"rewards": rewards, "mean_entropy": mean_entropy, "loss": loss}

    return run


@offers("linear logprob + entropy", name=f"{NAME} chunked", rounds=True)
def linear_stats() -> Call:
    head = _chunked_head()
    return lambda x: dict(zip(("logprob", "entropy"), head(x)))


@offers("linear policy loss", name=f"{NAME} chunked", rounds=True)
def linear_policy_loss() -> Call:
    return _policy_loss_of(_chunked_head())


@offers("linear policy loss", name=f"{NAME} Triton", rounds=True)
def linear_kernel_policy_loss() -> Call:
    need_cuda(NAME)
    return _policy_loss_of(_triton_head())


@offers("linear logprob + entropy", name=f"{NAME} Triton", rounds=True)
def linear_kernel() -> Call:
    need_cuda(NAME)
    head = _triton_head()
    return lambda x: dict(zip(("logprob", "entropy"), head(x)))


Head = Callable[[HeadInputs], tuple[Tensor, Tensor]]  # logprob, entropy


def _chunked_head() -> Head:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    head = FusedLinearForPPO()
    return lambda x: head(x.hidden, x.weight, x.token_ids)


def _triton_head() -> Head:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda x: linear_cross_entropy(x.hidden, x.weight, x.token_ids, 1.0, "none")


def _policy_loss_of(head: Head) -> Call:
    loss = _grpo_loss()
    return lambda x: {"loss": loss(x.by_response(head(x)[0]).float(), x)}


def _logprobs() -> Call:
    from verl.utils.torch_functional import logprobs_from_logits

    def logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
        # The kernel it takes where flash-attn is installed would write over the shared logits.
        return logprobs_from_logits(logits, token_ids, inplace_backward=False)

    return logprobs


def _clipped_loss() -> Call:
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla
    from verl.workers.config import ActorConfig

    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio=CLIP,
        clip_ratio_low=CLIP,
        clip_ratio_high=CLIP,
    )

    def clipped_loss(old: Tensor, logprob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return compute_policy_loss_vanilla(old, logprob, advantages, mask, config=config)[0]

    return clipped_loss


def _grpo_loss() -> Callable[[Tensor, Inputs | HeadInputs], Tensor]:
    from verl.trainer.ppo.core_algos import agg_loss, kl_penalty

    clipped_loss = _clipped_loss()

    def grpo_loss(logprob: Tensor, x: Inputs | HeadInputs) -> Tensor:  # [B, T]
        mask = x.mask.float()
        loss = clipped_loss(x.old_logprobs, logprob, x.advantages[:, None].expand_as(mask), mask)
        kl = kl_penalty(logprob, x.ref_logprobs, "k3")
        return loss + LOSS_KL_COEF * agg_loss(kl, mask, "token-mean")

    return grpo_loss


def _token_scores(x: Inputs) -> Tensor:  # [B, T]
    scores = torch.zeros_like(x.values)
    scores[:, -1] = x.scores
    return scores
