"""Names of metrics: ours, and those of trainers that log the same quantity in the same unit."""

from __future__ import annotations

from collections.abc import Mapping

from kl_kernels.checks import check_choice

# The means are over the tokens (or answers) of a batch; KL and entropy in nats.
DEFINITIONS = {
    "kl_token_mean": "KL(policy || reference), mean over tokens",
    "kl_sequence_sum": "KL(policy || reference), summed over each answer, mean over answers",
    "kl_coef": "beta, what a nat of KL costs in reward",
    "entropy": "of the policy, mean over tokens",
    "sampling_gap": "-logprob of the sampled tokens - entropy, mean over tokens",
    "sampling_gap_error": "the standard error of sampling_gap",
    "reward": "score of an answer before any KL, mean over answers",
    "grad_norm": "of the policy, before clipping",
    "clip_fraction": "share of tokens whose policy loss is clipped",
    "ratio_max": "policy / policy that sampled, the largest of any token",
    "ratio_mean": "the same, mean over tokens",
    "approx_kl": "KL(policy that sampled || policy), mean over tokens, by k3",
    "approx_kl_k1": "the same by k1, the mean difference of log-probabilities",
    "policy_loss": "clipped loss, mean over tokens",
    "value_loss": "half the (clipped) squared error of the value head, mean over tokens",
    "length": "tokens of an answer, mean over answers",
}

# A name is only here if the trainer's number under it has the same definition; the estimator of KL
# to the reference may differ, as theirs is k1 or k3 where ours can be exact. Not here, for example:
# PPOTrainer's policy/approxkl_avg and val/ratio, which count padding; verl's
# actor/reward_kl_penalty and OpenRLHF's kl, means over answers of each answer's mean over tokens.
NAMES: Mapping[str, Mapping[str, str]] = {
    "kl_kernels": {},
    "trl": {  # GRPOTrainer 1.16, and where that logs no such thing PPOTrainer (up to 1.12)
        "kl_token_mean": "kl",
        "kl_sequence_sum": "objective/kl",
        "kl_coef": "objective/kl_coef",  # PPOTrainer up to 0.11
        "entropy": "entropy",
        "reward": "reward",
        "grad_norm": "grad_norm",
        "clip_fraction": "clip_ratio/region_mean",
        "policy_loss": "loss/policy_avg",
        "value_loss": "loss/value_avg",
        "length": "completions/mean_length",
    },
    "verl": {  # 0.9, with its default loss_agg_mode, token-mean
        "kl_token_mean": "actor/kl_loss",
        "kl_coef": "actor/reward_kl_penalty_coeff",
        "entropy": "actor/entropy",
        "reward": "critic/score/mean",
        "grad_norm": "actor/grad_norm",
        "clip_fraction": "actor/pg_clipfrac",
        "approx_kl_k1": "actor/ppo_kl",
        "policy_loss": "actor/pg_loss",
        "value_loss": "critic/vf_loss",
        "length": "response_length/mean",
    },
    "openrlhf": {  # 0.11
        "entropy": "entropy_loss",
        "reward": "reward",
        "grad_norm": "actor_grad_norm",
        "clip_fraction": "ppo_clip_ratio",
        "approx_kl_k1": "ppo_kl",
        "policy_loss": "policy_loss",
        "value_loss": "critic_loss",
        "length": "response_length",
    },
}


def rename(metrics: Mapping[str, float], names: str, prefix: str = "") -> dict[str, float]:
    """`metrics` under the names of a trainer.

    Args:
        metrics: by our names, see DEFINITIONS.
        names: "kl_kernels" (as they are), "trl", "verl" or "openrlhf". With the last three, a
            metric the trainer does not log, or logs in another unit, becomes "kl_kernels/" + name,
            so that no curve is continued by another quantity.
        prefix: put before every name; TRL's and OpenRLHF's dashboards show "train/" before theirs.

    Raises:
        ValueError: there is no such `names`.
    """
    check_choice("names", names, tuple(NAMES))
    theirs = NAMES[names]
    own = "" if names == "kl_kernels" else "kl_kernels/"
    return {prefix + theirs.get(name, own + name): value for name, value in metrics.items()}
