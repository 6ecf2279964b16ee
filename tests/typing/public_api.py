"""Typical calls for a user's own strict type checker: `make lint` runs one on this file.

Never executed. `assert_type` is red for what has become Any, and an `ignore` is red (as unused)
once the wrong call beside it is no longer seen to be wrong.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from typing_extensions import assert_type

import kl_kernels
from kl_kernels.integrations import openrlhf, trl, verl
from kl_kernels.monitor import DriftSummary, Event, Limits, Sink, summarize_drift
from kl_kernels.monitor.sinks import TensorBoardSink

Metrics = dict[str, Tensor]


def operators(logits: Tensor, ref_logits: Tensor, ids: Tensor, mask: Tensor) -> None:
    stats = kl_kernels.token_stats(logits, ids, mask=mask, temperature=0.7)
    assert_type(stats, kl_kernels.TokenStats)
    assert_type(stats.entropy, Tensor)
    logprob, *_ = result = kl_kernels.token_kl(logits, ref_logits, ids, softcap=30, backend="cpu")
    assert_type(logprob, Tensor)
    assert_type(result.kl, Tensor)
    assert_type(kl_kernels.token_jsd(logits, ref_logits, beta=0.5), Tensor)
    assert_type(kl_kernels.topk_kl(logits, ids, topk_logprobs=ref_logits), Tensor)
    assert_type(kl_kernels.selective_log_softmax(logits, ids), Tensor)

    kept = kl_kernels.Support.of(logits, top_k=50, top_p=0.9)
    assert_type(kept, kl_kernels.Support)
    assert_type(kl_kernels.token_stats(logits, ids, support=kept), kl_kernels.TokenStats)
    kl_kernels.token_stats(logits, ids, support=ids)  # type: ignore[arg-type]
    kl_kernels.token_kl(logits, ref_logits, ids, ref_support="all")  # type: ignore[arg-type]

    kl_kernels.token_kl(logits, ref_logits)  # type: ignore[call-arg]
    kl_kernels.token_kl(logits, ref_logits, ids, mask)
    kl_kernels.token_kl(logits, ref_logits, ids, mask, 0.7)  # type: ignore[call-arg]
    kl_kernels.token_kl(logits, ref_logits, ids, temperature="low")  # type: ignore[arg-type]
    kl_kernels.token_stats(logits, ids, temprature=0.7)  # type: ignore[call-arg]
    stats.kl  # type: ignore[attr-defined]  # noqa: B018
    kl_kernels.token_kls  # type: ignore[attr-defined]  # noqa: B018


def linear_heads(hidden: Tensor, weight: Tensor, ids: Tensor) -> None:
    heads = (hidden, weight, hidden, weight)
    assert_type(kl_kernels.linear_token_stats(hidden, weight, ids), kl_kernels.TokenStats)
    assert_type(kl_kernels.linear_token_kl(*heads, ids), kl_kernels.TokenKL)
    assert_type(kl_kernels.linear_token_jsd(*heads, memory_budget=2**26), Tensor)
    loss = kl_kernels.linear_policy_loss(hidden, weight, ids, None, hidden, hidden)
    assert_type(loss, tuple[Tensor, dict[str, Tensor]])

    kl_kernels.linear_token_stats(hidden, weight)  # type: ignore[call-arg]
    kl_kernels.linear_token_jsd(*heads, memory_budget="64 MB")  # type: ignore[arg-type]


def ppo_step(logits: Tensor, ref_logits: Tensor, ids: Tensor, mask: Tensor, scores: Tensor) -> None:
    controller = kl_kernels.AdaptiveKLController(0.1, target=6.0, horizon=1e4, unit="sequence_sum")
    rollout = kl_kernels.kl_rewards(
        logits, ref_logits, ids, scores, mask, kl_coef=controller.value, kl_estimator="exact"
    )
    assert_type(rollout, kl_kernels.KLRewards)
    advantages, returns = kl_kernels.compute_gae(rollout.rewards, rollout.kl, mask)
    advantages = kl_kernels.masked_whiten(advantages + rollout.advantage_correction, mask)
    fused = kl_kernels.fused_policy_loss(
        logits, ids, rollout.logprob, advantages, mask, ref_logits=ref_logits, kl_loss_coef=0.1
    )
    assert_type(fused, tuple[Tensor, Metrics])
    loss, _ = kl_kernels.ppo_policy_loss(rollout.logprob, rollout.logprob, advantages, mask)
    value_loss, _ = kl_kernels.ppo_value_loss(returns, None, returns, mask, clip_range=0.2)
    assert_type(loss + value_loss, Tensor)
    denominator = kl_kernels.global_denominator(mask, "seq-mean-token-sum")
    assert_type(denominator, Tensor)
    assert_type(kl_kernels.aggregate(rollout.kl, mask, denominator=denominator), Tensor)
    assert_type(kl_kernels.kl_penalty(rollout.logprob, rollout.ref_logprob, "k3"), Tensor)
    assert_type(controller.update(rollout.kl, len(scores), mask=mask).value, float)
    assert_type(kl_kernels.masked_mean(rollout.kl, mask), Tensor)

    packed = kl_kernels.compute_gae(rollout.rewards, rollout.kl, mask, cu_seqlens=ids)
    assert_type(packed, tuple[Tensor, Tensor])
    kl_kernels.aggregate(rollout.kl, mask, "seq-mean-token-sum", cu_seqlens=ids)
    controller.update(rollout.kl, len(scores), mask=mask, cu_seqlens=ids)

    kl_kernels.aggregate(rollout.kl, mask, cu_seqlens=[0, 4])  # type: ignore[arg-type]
    kl_kernels.kl_rewards(logits, ref_logits, ids, scores, mask)  # type: ignore[call-arg]
    kl_kernels.compute_gae(rollout, returns, mask)  # type: ignore[arg-type]
    kl_kernels.global_denominator(mask, "mean")  # type: ignore[arg-type]
    kl_kernels.AdaptiveKLController(0.1, target=6.0, horizon=1e4)  # type: ignore[call-arg]
    loss, metrics, _ = fused  # type: ignore[misc]


class Printer:
    """A sink of a user's own: anything with these methods is one."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        print(step, metrics)

    def alert(self, event: Event) -> None:
        print(event.kind, event.message)

    def close(self) -> None:
        print("closed")


def watch(kl: Tensor, ids: Tensor, mask: Tensor) -> None:
    sinks: list[Sink] = [kl_kernels.AuditLog("audit.jsonl", header={"seed": 5})]
    sinks += [TensorBoardSink("runs", names="trl"), Printer()]
    monitor = kl_kernels.KLMonitor(kl_budget=30.0, limits=Limits(), sinks=sinks)
    for event in monitor.observe(1, kl=kl, kl_coef=0.1, entropy=kl, logprob=-kl, mask=mask):
        assert_type(event, Event)
    gap, error = kl_kernels.sampling_gap(-kl, kl, mask)
    assert_type(gap, Tensor)
    constraint = kl_kernels.UpdateConstraint(max_kl=0.1)
    assert_type(constraint.check(1, kl=0.2), Event | None)
    assert_type(summarize_drift(kl, mask, token_ids=ids), DriftSummary)

    kl_kernels.KLMonitor(30.0, sinks=[print])  # type: ignore[list-item]
    monitor.observe(kl=kl)  # type: ignore[call-arg]
    kl_kernels.KLMonitor(unit="nats")  # type: ignore[arg-type]
    kl_kernels.UpdateConstraint(0.1, action="undo")  # type: ignore[arg-type]


def inside_a_trainer(device: torch.device) -> None:
    with trl.patch(backend="triton"), verl.patch(), openrlhf.patch():
        print("trainer.train()")
    trl.patch(backend=device)  # type: ignore[arg-type]
