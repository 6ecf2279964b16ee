"""kl_kernels: one call for each operation."""

from __future__ import annotations

import torch

import kl_kernels
from bench.peers.contenders import FUSED, OURS, Call, offers
from bench.peers.definitions import (
    CLIP,
    ENTROPY_COEF,
    GAMMA,
    JSD_BETA,
    KL_COEF,
    LAM,
    LOSS_KL_COEF,
    Results,
    Sampled,
    kl_loss,
)
from bench.peers.heads import HeadInputs
from bench.peers.operations import GAEInputs, Inputs

ONE = 1.0  # upstream gradients are known to be 1, so the fused loss need not multiply by them


@offers("token logprob", name=OURS, tolerance=FUSED)
def logprob() -> Call:
    return lambda x: {"logprob": kl_kernels.selective_log_softmax(x.logits, x.token_ids)}


@offers("logprob + entropy", name=OURS, tolerance=FUSED)
def stats() -> Call:
    return lambda x: kl_kernels.token_stats(x.logits, x.token_ids)._asdict()


@offers("exact KL", name=OURS, tolerance=FUSED)
def token_kl() -> Call:
    return lambda x: kl_kernels.token_kl(x.logits, x.ref_logits, x.token_ids)._asdict()


@offers("JSD", name=OURS, tolerance=FUSED)
def token_jsd() -> Call:
    return lambda x: {"jsd": kl_kernels.token_jsd(x.logits, x.ref_logits, beta=JSD_BETA)}


@offers("shaped reward", name=OURS, tolerance=FUSED)
def rewards() -> Call:
    def run(x: Inputs) -> Results:
        return {"rewards": rollout(x).rewards}

    return run


def rollout(x: Inputs) -> kl_kernels.KLRewards:
    return kl_kernels.kl_rewards(
        x.logits, x.ref_logits, x.token_ids, x.scores, x.mask, kl_coef=KL_COEF
    )


@offers("policy loss", name=OURS, tolerance=FUSED)
def policy_loss() -> Call:
    def run(x: Inputs) -> Results:
        loss, _ = kl_kernels.fused_policy_loss(
            x.logits,
            x.token_ids,
            x.old_logprobs,
            per_token(x),
            x.mask,
            loss_scale=ONE,
            ref_logprobs=x.ref_logprobs,
            kl_estimator="k3",
            kl_loss_coef=LOSS_KL_COEF,
            clip_low=CLIP,
            clip_high=CLIP,
        )
        return {"loss": loss}

    return run


@offers("policy loss with exact KL", name=OURS, tolerance=FUSED)
def policy_loss_with_exact_kl() -> Call:
    def run(x: Inputs) -> Results:
        loss, _ = kl_kernels.fused_policy_loss(
            x.logits,
            x.token_ids,
            x.old_logprobs,
            per_token(x),
            x.mask,
            loss_scale=ONE,
            ref_logits=x.ref_logits,
            kl_loss_coef=LOSS_KL_COEF,
            entropy_coef=ENTROPY_COEF,
            clip_low=CLIP,
            clip_high=CLIP,
        )
        return {"loss": loss}

    return run


@offers(
    "policy loss with exact KL",
    name=f"{OURS} in two visits",
    tolerance=FUSED,
    note="`token_kl` and a loss in torch: each logit is read twice",
)
def two_visits() -> Call:
    def run(x: Inputs) -> Results:
        stats = kl_kernels.token_kl(x.logits, x.ref_logits, x.token_ids)._asdict()
        return {"loss": kl_loss(stats, x)}

    return run


def per_token(x: Sampled) -> torch.Tensor:  # [B, T]
    return x.advantages[:, None].expand_as(x.old_logprobs)


@offers("linear logprob + entropy", name=OURS, tolerance=FUSED)
def linear_stats() -> Call:
    def run(x: HeadInputs) -> Results:
        return kl_kernels.linear_token_stats(x.hidden, x.weight, x.token_ids)._asdict()

    return run


@offers("linear JSD", name=OURS, tolerance=FUSED)
def linear_jsd() -> Call:
    def run(x: HeadInputs) -> Results:
        factors = x.hidden, x.weight, x.ref_hidden, x.ref_weight
        return {"jsd": kl_kernels.linear_token_jsd(*factors, beta=JSD_BETA)}

    return run


@offers("linear policy loss", name=OURS, tolerance=FUSED)
def linear_policy_loss() -> Call:
    def run(x: HeadInputs) -> Results:
        loss, _ = kl_kernels.linear_policy_loss(
            x.by_response(x.hidden),
            x.weight,
            x.by_response(x.token_ids),
            x.old_logprobs,
            per_token(x),
            x.mask,
            loss_scale=ONE,
            ref_logprobs=x.ref_logprobs,
            kl_estimator="k3",
            kl_loss_coef=LOSS_KL_COEF,
            clip_low=CLIP,
            clip_high=CLIP,
        )
        return {"loss": loss}

    return run


@offers("linear exact KL", name=OURS, tolerance=FUSED)
def linear_kl() -> Call:
    def run(x: HeadInputs) -> Results:
        return kl_kernels.linear_token_kl(
            x.hidden, x.weight, x.ref_hidden, x.ref_weight, x.token_ids
        )._asdict()

    return run


@offers("GAE", name=OURS, tolerance=FUSED)
def advantages() -> Call:
    def run(x: GAEInputs) -> Results:
        result = kl_kernels.compute_gae(x.rewards, x.values, x.mask, gamma=GAMMA, lam=LAM)
        return dict(zip(("advantages", "returns"), result))

    return run


@offers("PPO step", name=OURS, tolerance=FUSED)
def ppo_step() -> Call:
    def run(x: Inputs) -> Results:
        with torch.no_grad():
            before = rollout(x)
        advantages, _ = kl_kernels.compute_gae(
            before.rewards, x.values, x.mask, gamma=GAMMA, lam=LAM
        )
        loss, metrics = kl_kernels.fused_policy_loss(
            x.logits,
            x.token_ids,
            before.logprob,
            kl_kernels.masked_whiten(advantages, x.mask),
            x.mask,
            clip_low=CLIP,
            clip_high=CLIP,
            loss_scale=ONE,
        )
        return {"rewards": before.rewards, "mean_entropy": metrics["entropy"], "loss": loss}

    return run
