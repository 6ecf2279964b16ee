"""Leaving off with a batch once the policy has moved far enough on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from torch import Tensor

from kl_kernels.checks import check_choice, check_positive
from kl_kernels.rl.measure import measure_kl

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup

When = Literal["before_step", "after_epoch"]
TOLERANCES: dict[When, float] = {"before_step": 1.5, "after_epoch": 1.0}


class KLEarlyStop:
    """Tells when to stop taking steps on a batch: KL(old policy || policy) exceeds a target.

    Two rules are in use. "before_step" looks at every minibatch before its step, which is not
    taken then, and no other on this batch either: Stable-Baselines3's, with its tolerance of 1.5.
    "after_epoch" looks at the last minibatch of an epoch, whose step has been taken: CleanRL's,
    with no tolerance. One loop serves both:

        for epoch in range(epochs):
            for minibatch in minibatches:
                loss, metrics = ...
                if early_stop.before_step(metrics["approx_kl"]):
                    break
                ...  # the step
            if early_stop.after_epoch():
                break

    Both measure with k3, (r - 1) - log r with r = policy / old policy, which is never negative:
    `metrics["approx_kl"]` of the policy losses, or
    `kl_penalty(old_logprobs, logprobs.detach(), "k3")` per token.

    Args:
        target_kl: nats per token, above 0; 0.01 to 0.03 are usual.
        when: "before_step" or "after_epoch".
        tolerance: stops above tolerance x target_kl, above 0. None: the rule's own, 1.5 or 1.

    Raises:
        TypeError, ValueError: an argument has the wrong type or is outside its range.

    Examples:
        >>> import kl_kernels
        >>> early_stop = kl_kernels.KLEarlyStop(0.02)  # leaves off above 1.5 x 0.02
        >>> [early_stop.before_step(kl) for kl in (0.001, 0.025, 0.04)]
        [False, False, True]
    """

    def __init__(
        self, target_kl: float, *, when: When = "before_step", tolerance: float | None = None
    ) -> None:
        target_kl = check_positive("target_kl", target_kl)
        check_choice("when", when, get_args(When))
        tolerance = check_positive(
            "tolerance", TOLERANCES[when] if tolerance is None else tolerance
        )
        self.limit = tolerance * target_kl
        self.when = when
        self._last = 0.0

    def __repr__(self) -> str:
        return f"KLEarlyStop(when={self.when!r}, limit={self.limit:g}, last_kl={self._last:g})"

    def before_step(
        self,
        kl: Tensor | float,  # [B, T]
        mask: Tensor | None = None,  # [B, T]
        *,
        group: ProcessGroup | None = None,
    ) -> bool:
        """Whether to leave this minibatch's step out, and with it the rest of the batch.

        Args:
            kl: [B, T] KL(old policy || policy) per token in nats, to be averaged over the tokens of
                `mask`; or a number, the minibatch's mean. NaN stops. A minibatch without tokens
                stops nothing, and is not what `after_epoch` looks at.
            mask: [B, T] bool, or numbers that are 0 or 1, with per-token KL only.
            group: data-parallel ranks that each pass their own sequences; all get one answer.
                Without it, and with numbers, pass what has been averaged over ranks: a rank that
                stops alone leaves the others waiting for its gradients.

        Raises:
            TypeError, ValueError: shapes disagree, or an argument has the wrong type.
        """
        measured = measure_kl(kl, mask, "token_mean", group)
        if measured is None:  # whatever was measured last may be of the batch before
            return False
        self._last = measured
        return self.when == "before_step" and self._exceeded()

    def after_epoch(self) -> bool:
        """Whether to leave the remaining epochs out."""
        return self._exceeded()

    def _exceeded(self) -> bool:
        return not self._last <= self.limit
