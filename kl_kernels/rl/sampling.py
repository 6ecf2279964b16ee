"""Whether tokens were sampled from the distribution that scored them: the sampling gap.

For a token drawn from p, E[-log p(token)] is the entropy of p, whatever p is. So

    gap = mean over tokens of (-logprob - entropy)

is 0 but for noise. Of one sequence the terms are a martingale difference sequence: each has mean 0
given the tokens before it. They are uncorrelated for that reason, however much the tokens depend
on each other, and the variance of their sum is the expected sum of their squares. A mask may end a
sequence by what was sampled (at its first EOS). It must not choose among sequences by their tokens,
as filters of long or badly rewarded answers do: what is left is no longer a sample of the policy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kl_kernels.checks import check_like, check_mask
from kl_kernels.rl.collectives import sum_over_ranks
from kl_kernels.rl.masked import select
from kl_kernels.schemas import output_dtype

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class SamplingGap(NamedTuple):
    """The sampling gap of a batch and its standard error, each [], in nats per token."""

    gap: Tensor
    standard_error: Tensor


class GapSums(NamedTuple):
    """Sums over the tokens of a batch."""

    tokens: float
    gap: float  # sum of -logprob - entropy, nats
    squares: float  # sum of the squares of -logprob - entropy
    entropy: float  # nats


def sampling_gap(
    logprob: Tensor,  # [B, T]
    entropy: Tensor,  # [B, T]
    mask: Tensor,  # [B, T]
    *,
    group: ProcessGroup | None = None,
) -> SamplingGap:
    """Mean of (-logprob - entropy) over the sampled tokens, which is 0 but for noise.

    A gap of several standard errors says that the tokens were not sampled from what scored them:

        above 0: logits and token_ids are off by one position; another tokenizer or other weights
            sampled; the sampling temperature was higher than the one of scoring. +inf: a token was
            sampled that scoring rules out.
        below 0: the sampling temperature was lower; top-p, top-k or min-p were applied in sampling
            and not in scoring.

    Of few tokens, or of a policy that is nearly sure of each, the standard error is too small as
    long as no rare token has been drawn; `KLMonitor` allows for that. The log-probabilities must be
    those of the weights that sampled, before the first step on the batch.

    Args:
        logprob: [B, T] log-probability of each sampled token, as `token_stats` gives it, from the
            logits that the token was sampled from and at the temperature of sampling.
        entropy: [B, T] nats, of the same logits at the same temperature.
        mask: [B, T] bool, or numbers that are 0 or 1: 1 at tokens that the policy sampled, not at
            prompts, padding or tool output. NaN elsewhere changes nothing.
        group: data-parallel ranks that each pass their own sequences; they must call this together,
            and all get the gap of the whole batch. A rank may have no token.

    Returns:
        SamplingGap(gap, standard_error): 0-dim, nats per token, without gradient; float32 (float64
        for float64 logprob). Both are 0 where the mask leaves no token.

    Raises:
        TypeError, ValueError: `entropy` or `mask` is not a tensor of logprob's shape and device.

    Examples:
        >>> import torch, kl_kernels
        >>> logits = torch.tensor([2.0, 1.0, 0.0]).expand(1, 3000, 3)
        >>> weights = logits[0, 0].softmax(0)
        >>> _ = torch.manual_seed(0)
        >>> token_ids = torch.multinomial(weights, 3000, replacement=True)[None]
        >>> stats = kl_kernels.token_stats(logits, token_ids)
        >>> mask = torch.ones_like(token_ids)
        >>> gap, error = kl_kernels.sampling_gap(stats.logprob, stats.entropy, mask)
        >>> bool(abs(gap) < 3 * error)
        True
        >>> cold = kl_kernels.token_stats(logits, token_ids, temperature=2.0)  # sampled at 1
        >>> gap, error = kl_kernels.sampling_gap(cold.logprob, cold.entropy, mask)
        >>> bool(gap < -10 * error)
        True
    """
    tokens, gap, squares, _ = gap_sums(logprob, entropy, mask, group).unbind()
    tokens = tokens.clamp_min(1)
    dtype = output_dtype(logprob)
    return SamplingGap((gap / tokens).to(dtype), (squares.sqrt() / tokens).to(dtype))


def gap_sums(
    logprob: Tensor,  # [...]
    entropy: Tensor,  # [...]
    mask: Tensor,  # [...]
    group: ProcessGroup | None = None,
) -> Tensor:  # [4] float64
    """The numbers of `GapSums`, over all ranks of `group`, by one collective."""
    check_like("entropy", entropy, "logprob", logprob)
    check_like("mask", mask, "logprob", logprob)
    mask = check_mask("mask", mask)
    entropy = select(entropy.detach(), mask, torch.float64)
    gap = -select(logprob.detach(), mask, torch.float64) - entropy
    sums = torch.stack([mask.sum().double(), gap.sum(), gap.square().sum(), entropy.sum()])
    return sums if group is None else sum_over_ranks(sums, group)
