"""Limits of the monitor's detectors, and the reason for each default."""

from __future__ import annotations

from dataclasses import dataclass, fields

from kl_kernels.checks import check_non_negative, check_positive, check_unit_interval

# Nats that identical policies differ by through arithmetic alone: bfloat16 moves the log-prob of a
# token by about 1e-2 either way, of 1000 tokens by 0.3. A wrong reference costs tens of nats.
START_KL = {"sequence_sum": 0.5, "token_mean": 0.01}

# Nats below 0. TRL, too, warns below -1 for a sequence; a token is taken as a fiftieth of one.
NEGATIVE_KL = {"sequence_sum": 1.0, "token_mean": 0.02}

_CHECKS = {
    "entropy_left": check_unit_interval,
    "start_kl": check_non_negative,
    "negative_kl": check_non_negative,
}


@dataclass(frozen=True)
class Limits:
    """Limits of the detectors. The rates that the defaults lead to: docs/monitoring.md.

    Raises:
        ValueError: a value is outside its range.
    """

    # Robust standard deviations (1.4826 MAD) from the median of the 64 values before. Normal noise
    # stays within 6 once the median and the MAD are known exactly; the detector widens the limit
    # for how few values they come from.
    jump: float = 6.0

    # Log-likelihood ratio of "the level has moved up" against "it has not". By simulation, AR(1)
    # noise with phi = 0.6 passes 7.9 in one run of thirty, and one less in more than twice as many.
    drift: float = 7.9

    # The same for "the level has moved down": higher, as a falling KL is news but no danger, which
    # leaves more of the accepted false alarms to a rising one.
    drift_down: float = 11.0

    # Nats of KL at step 0, where policy and reference are the same; None: START_KL of the unit.
    start_kl: float | None = None

    # Nats below 0 at which a KL is no noise of sampling; None: NEGATIVE_KL of the unit.
    negative_kl: float | None = None

    # Part of its first level that the entropy may fall to. Policies do sharpen; one that has
    # lost half its entropy has begun to repeat itself.
    entropy_left: float = 0.5

    # The largest importance ratio. PPO stops rewarding at 1.2; TRL's ratio_threshold is 10 too.
    ratio: float = 10.0

    # Standard errors by which -logprob must differ from the entropy. Of normal batches, one in two
    # million is beyond 5; the detector's standard error allows for distributions with rare tokens.
    sampling_gap: float = 5.0

    # Nats per token by which they must differ as well. Engines that round differently leave about
    # 1e-3, which enough tokens show beyond any number of standard errors.
    sampling_gap_nats: float = 0.02

    # Standard errors by which the KL must curve upwards and the reward must rise, both at once. By
    # simulation, independent noise passes 4 in both in fewer than one run of a hundred.
    acceleration: float = 4.0

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            if value is None and f.default is None:
                continue
            check = _CHECKS.get(f.name, check_positive)
            object.__setattr__(self, f.name, check(f.name, value))
