"""A sampling gap that is no noise: tokens were not sampled from what scored them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from kl_kernels.monitor.detectors import Detector
from kl_kernels.monitor.events import Event
from kl_kernels.rl.sampling import GapSums, gap_sums
from kl_kernels.rl.sequences import sequences_of

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

# Weight of the sums so far when a batch comes in: a gap too small for one batch shows within 20.
MEMORY = 0.9

# The variance of a token is counted as at least this many nats times its entropy, below and above
# 0. A sample without the rare tokens of its distribution shows hardly a variance, and a gap below
# 0. But a sum over tokens of p (log p)^2 is at most the entropy times -log p of the rarest token
# that matters, and 12 nats are a probability of 6e-6. By enumeration over distributions of two
# levels (one token likely, the rest spread over up to 150,000; and the other way round) an alarm
# below 0 is then as rare as one above 0, where less will do.
RARE_NATS_BELOW, RARE_NATS_ABOVE = 12.0, 3.0

IMPOSSIBLE = (
    "a sampled token has probability 0 under the logits that score it: scoring rules out tokens "
    "that sampling did not (top-k or top-p, padded columns), or logits and token_ids belong to "
    "different positions or vocabularies"
)
ABOVE = (
    "logits and token_ids may be off by one position (row t must hold the logits that token t was "
    "sampled from), another tokenizer or other weights may have sampled, or a higher temperature "
    "than the one of scoring"
)
BELOW = (
    "tokens may have been sampled at a lower temperature than the one of scoring, or with top-p, "
    "top-k or min-p that scoring does not apply"
)


class NonzeroGap(Detector):
    """-logprob - entropy, whose mean is 0 for tokens sampled from what scores them, is not.

    Sums over the batches so far, each older one counting a tenth less, are compared with their
    standard error. The square of a sum is at most the number of terms times the sum of squares, so
    fewer than `limit`^2 tokens never alarm. Told again only after half of the limit; so is a token
    of probability 0, only after a batch without one.

    False alarms: below 2e-6 in one batch, by enumeration over distributions with rare tokens.
    """

    keeps = ("sums", "told", "impossible")

    def __init__(self, limit: float, nats: float) -> None:
        super().__init__("sampling_gap")
        self.limit, self.nats = limit, nats
        self.sums = [0.0] * len(GapSums._fields)
        self.told = False
        self.impossible = False

    def observe_sums(self, step: int, sums: GapSums) -> Event | None:
        """Return the next batch's event, if any; a gap of NaN or -inf leaves no trace."""
        if sums.gap == math.inf:
            again, self.impossible = self.impossible, True
            return None if again else Event(step, self.name, math.inf, self.nats, IMPOSSIBLE)
        if not math.isfinite(sums.gap):
            return None
        self.impossible = False
        # A sum weighted by w has a variance weighted by w^2.
        weights = MEMORY, MEMORY, MEMORY**2, MEMORY**2
        self.sums = [w * old + new for w, old, new in zip(weights, self.sums, sums)]
        return self._compare(step, GapSums(*self.sums))

    def _compare(self, step: int, sums: GapSums) -> Event | None:
        gap = sums.gap / sums.tokens
        rare_nats = RARE_NATS_ABOVE if gap > 0 else RARE_NATS_BELOW
        error = math.sqrt(max(sums.squares, rare_nats * sums.entropy)) / sums.tokens
        limit = max(self.nats, self.limit * error)
        if abs(gap) <= limit / 2:
            self.told = False
        if self.told or abs(gap) <= limit:
            return None
        self.told = True
        side, meaning = ("above", ABOVE) if gap > 0 else ("below", BELOW)
        message = (
            f"-logprob of the sampled tokens is {abs(gap):.3g} nats per token {side} the entropy "
            f"(limit {limit:.2g}), and would equal it if they were sampled from the logits that "
            f"score them: {meaning}"
        )
        return Event(step, self.name, gap, math.copysign(limit, gap), message)


def sums_of_batch(
    logprob: Tensor,  # [B, T]
    entropy: Tensor | float | None,  # [B, T]
    mask: Tensor | None,  # [B, T]
    group: ProcessGroup | None,
    cu_seqlens: Tensor | None = None,  # [S + 1]
) -> GapSums:
    """Sum the arguments of `KLMonitor.observe` over all ranks of `group`.

    Raises:
        TypeError, ValueError: logprob is not [B, T], or entropy or mask is no tensor like it.
    """
    sequences_of("logprob", logprob, cu_seqlens)
    if not isinstance(entropy, Tensor) or mask is None:
        missing = "mask" if isinstance(entropy, Tensor) else "entropy"
        raise ValueError(
            f"logprob has shape {tuple(logprob.shape)}, so it needs {missing} as a tensor like it"
        )
    return GapSums(*gap_sums(logprob, entropy, mask, group).tolist())
