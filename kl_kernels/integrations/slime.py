r"""slime: an advantage function for its command line.

    --advantage-estimator ppo \
    --custom-advantage-function-path kl_kernels.integrations.slime.advantages

It is slime's PPO of the tokens that the policy sampled, and of no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kl_kernels.rl.advantages import compute_gae
from kl_kernels.rl.rewards import compute_rewards


def advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """Rewards with the KL, and GAE over them, of the tokens that the policy sampled.

    slime's own estimator "ppo" does the same without `loss_masks`: there tool output in a response
    has a KL penalty, a value and a place in time, and the score is at the last position, also if
    it is masked. Here the score is at the policy's last token, and masked positions change nothing;
    their advantages and returns are 0. Without any there is no difference.

    slime calls this once the KL is estimated, and whitens advantages itself (normalize_advantages).
    It does not call it for a critic, whose returns stay those of its own estimator.

    Args:
        args: slime's arguments; kl_coef, gamma and lambd are read.
        rollout_data: lists with an entry per sample: "rewards" of numbers, "kl", "values" and
            "loss_masks" of [R] tensors, R the sample's response length. "advantages" and "returns"
            are added, of [R] float32 tensors.

    Raises:
        ValueError: there are no values, as without a critic; or a mask is not of its KL's length,
            as with context parallelism, where a rank has a part of a response alone.
    """
    if not rollout_data.get("values"):
        raise ValueError(
            'rollout_data["values"] is missing; GAE needs a critic: --advantage-estimator ppo'
        )
    kl, masks = rollout_data["kl"], rollout_data["loss_masks"]
    for i, (own, mask) in enumerate(zip(kl, masks)):
        if own.shape != mask.shape:
            raise ValueError(
                f"sample {i} has a kl of shape {tuple(own.shape)} and a loss mask of shape "
                f"{tuple(mask.shape)}; they must be equal, so no context parallelism"
            )
    padded_kl = _padded(kl)
    mask = _padded([mask.to(padded_kl.device) for mask in masks])
    scores = torch.tensor(rollout_data["rewards"], dtype=torch.float32, device=padded_kl.device)
    rewards = compute_rewards(scores, padded_kl, mask, args.kl_coef)
    results = compute_gae(
        rewards, _padded(rollout_data["values"]), mask, gamma=args.gamma, lam=args.lambd
    )
    for name, result in zip(("advantages", "returns"), results):
        rollout_data[name] = [row[: len(own)] for row, own in zip(result, kl)]


def _padded(rows: Sequence[Tensor]) -> Tensor:  # B rows of [R] -> [B, T]
    return pad_sequence([row.flatten() for row in rows], batch_first=True)
