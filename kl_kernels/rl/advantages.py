"""Generalised advantage estimation over masked token sequences."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_choice,
    check_like,
    check_mask,
    check_plain,
    check_unit_interval,
)
from kl_kernels.ops import library as _ops  # noqa: F401  registers torch.ops.kl_kernels
from kl_kernels.rl.rewards import placed_scores
from kl_kernels.rl.sequences import sequences_of
from kl_kernels.schemas import BackendName, GAEArgs, output_dtype

Masked = Literal["skip", "zero"]


def compute_gae(
    rewards: Tensor,  # [B, T]
    values: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    masked: Masked = "skip",
    last_values: Tensor | None = None,  # [B]
    cu_seqlens: Tensor | None = None,  # [S + 1]
    backend: BackendName | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of each token, by generalised advantage estimation.

        delta_t = rewards_t + gamma values_{t+1} - values_t
        advantages_t = delta_t + gamma lam advantages_{t+1}
        returns_t = advantages_t + values_t

    (Schulman et al. 2016, arXiv 1506.02438, equation 16.) After a sequence's last token everything
    is 0, as after a response that is finished; of one that was cut off, `last_values` has the value
    there, which stands for the rewards that it would have got.

    Masked positions carry neither reward nor value, and "skip" and "zero" differ in whether time
    passes over them. "skip": it does not, t + 1 is the next unmasked token (verl, miles); tool
    output in the middle of a response changes nothing. "zero": it does, they are tokens of reward
    and value 0 (TRL); the same where masked positions only follow the response.

    Each row is one sequence. If it is several responses one after the other, `cu_seqlens` must say
    where they lie: taken as one, the later ones' rewards and values would leak into the advantages
    of the earlier ones, silently.

    A reward at a masked position is dropped. With score_position "after_last" the score lies one
    position after the response, so `mask` must include that position.

    Args:
        rewards: [B, T] any float dtype, as `kl_rewards` and `compute_rewards` make them.
        values: [B, T] any float dtype; the value function's estimate at each token, before it is
            sampled.
        mask: [B, T] bool, or numbers that are 0 or 1 (looked at on a CPU alone); 1 at response
            tokens. NaN where it is 0 changes nothing.
        gamma: discount per token, 0 to 1.
        lam: lambda, 0 to 1; 1 gives the discounted reward-to-go minus the value.
        masked: "skip" or "zero".
        last_values: [B] any float dtype; the value function's estimate after each sequence's last
            unmasked token, 0 of those that are finished. It counts as reward and value of nothing:
            gamma times it is part of the last token's delta. A sequence without tokens has no use
            for it, even NaN. With cu_seqlens [S]. None: all are finished.
        cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at on
            a CPU alone): sequence s has the tokens from cu_seqlens[s] to before cu_seqlens[s + 1].
            Everything that is [B, T] here is then [N] or [1, N]. None: each row is one.
        backend: None (best available), "cuda", "triton", "cpu" or "reference".

    Returns:
        (advantages, returns), each [B, T], float32 (float64 if rewards or values are), exactly 0
        where masked, without gradient. Advantages are not whitened: see `masked_whiten`.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range.

    Examples:
        >>> import torch, kl_kernels
        >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
        >>> mask = torch.ones(1, 3, dtype=torch.bool)
        >>> advantages, returns = kl_kernels.compute_gae(rewards, values, mask, lam=1.0)
        >>> advantages, returns
        (tensor([[0.5000, 0.5000, 0.5000]]), tensor([[1., 1., 1.]]))
        >>> cut_off = torch.tensor([0.25])
        >>> kl_kernels.compute_gae(rewards, values, mask, lam=0.0, last_values=cut_off)[0]
        tensor([[0.0000, 0.0000, 0.7500]])
    """
    sequences = sequences_of("rewards", rewards, cu_seqlens)
    check_plain("rewards", rewards)
    check_like("values", values, "rewards", rewards)
    check_like("mask", mask, "rewards", rewards)
    mask = check_mask("mask", mask)
    gamma = check_unit_interval("gamma", gamma)
    lam = check_unit_interval("lam", lam)
    check_choice("masked", masked, get_args(Masked))
    dtype = torch.promote_types(output_dtype(rewards), output_dtype(values))
    rewards = rewards.detach().to(dtype)
    if last_values is not None:
        sequences.check_scores("last_values", last_values)
        # As a reward of the last token it is part of the same delta, and of that alone.
        after = gamma * last_values.detach().to(dtype)
        rewards = rewards + placed_scores(after, sequences.last(mask), sequences)
    shape = rewards.shape
    rows = shape if rewards.ndim == 2 else (1, *shape)  # the operator's
    args = GAEArgs(
        rewards=rewards.reshape(rows),
        values=values.detach().to(dtype).reshape(rows),
        mask=mask.reshape(rows),
        gamma=gamma,
        lam=lam,
        skip_masked=masked == "skip",
        cu_seqlens=sequences.cu_seqlens,
    )
    advantages, returns = torch.ops.kl_kernels.gae(*args, backend)
    return advantages.view(shape), returns.view(shape)
