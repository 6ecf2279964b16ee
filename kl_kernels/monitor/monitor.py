"""A monitor of a training run's KL and related figures, for any trainer, in three lines."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kl_kernels.checks import (
    check_choice,
    check_integer,
    check_like,
    check_mask,
    check_measured,
    check_positive,
    check_state,
)
from kl_kernels.monitor.acceleration import Acceleration
from kl_kernels.monitor.detectors import (
    Ceiling,
    Detector,
    EntropyCollapse,
    Jump,
    NegativeKL,
    SeriesDetector,
    StartKL,
)
from kl_kernels.monitor.events import Event, Sink
from kl_kernels.monitor.level_shift import LevelShift
from kl_kernels.monitor.limits import NEGATIVE_KL, START_KL, Limits
from kl_kernels.monitor.sampling_gap import NonzeroGap, sums_of_batch
from kl_kernels.rl.collectives import from_all_ranks
from kl_kernels.rl.masked import masked_mean
from kl_kernels.rl.measure import UNITS, Unit, has_tokens, measure_kl
from kl_kernels.rl.sampling import GapSums
from kl_kernels.rl.sequences import sequences_of

if TYPE_CHECKING:  # not in every build of torch
    from torch.distributed import ProcessGroup


class KLMonitor:
    """Tells when a run's KL, entropy, importance ratio or gradient norm is no longer as it was.

    Kinds of events, with what each needs:

        "non_finite" (anything): an input is NaN or infinite; each time.
        "start_kl" (kl): not 0 at step 0, so the reference is not what it should be.
        "negative_kl" (kl): below 0 beyond noise, so the policy is paid to diverge.
        "kl_budget" (kl, kl_budget): above the budget.
        "kl_jump" (kl): far from its recent median at once.
        "kl_drift" (kl): a lasting change of level; small ones show within 10 to 20 steps.
        "entropy_collapse" (entropy): half of its first level is gone.
        "sampling_gap" (logprob, entropy): tokens were not sampled from the logits that score them:
            logits and token_ids off by one position, a temperature, top-p or top-k that scoring
            does not have, another tokenizer or other weights.
        "ratio_explosion" (ratio): the largest importance ratio is above 10.
        "grad_norm_jump" (grad_norm): far above its recent median.
        "kl_acceleration" (kl, reward): the reward rises while the KL rises ever faster.

    A condition is reported again only after it has ended; jump and drift start anew at the new
    level. On 600 steps of AR(1) noise all detectors together raise fewer than 0.1 false alarms
    (docs/monitoring.md has the rates and the delays).

    None of this predicts reward hacking. These signals find it after the fact; an early warning at
    a usable rate of false alarms is not known.

    Args:
        kl_budget: nats of `unit` that the KL may reach, above 0; None: no budget.
        unit: "sequence_sum" (KL of a response, mean over responses) or "token_mean" (KL of a token,
            mean over tokens), of kl and of every limit in nats.
        limits: of the detectors; None: the defaults of `Limits`.
        sinks: each gets all metrics of a step by `log`, under the names of `names.DEFINITIONS`, and
            each event by `alert`. One that raises does not stop training: it is warned of once,
            and called on.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or is outside its range.

    Examples:
        >>> import torch, kl_kernels
        >>> monitor = kl_kernels.KLMonitor(kl_budget=30.0)
        >>> kl = torch.full((4, 10), 0.5)  # 5 nats per response
        >>> mask = torch.ones(4, 10)
        >>> monitor.observe(1, kl=kl, mask=mask)
        []
        >>> for event in monitor.observe(2, kl=8 * kl, mask=mask):
        ...     print(event.kind, event.value, event.limit)
        kl_budget 40.0 30.0
    """

    def __init__(
        self,
        kl_budget: float | None = None,
        *,
        unit: Unit = "sequence_sum",
        limits: Limits | None = None,
        sinks: Sequence[Sink] = (),
    ) -> None:
        check_choice("unit", unit, UNITS)
        if kl_budget is not None:
            kl_budget = check_positive("kl_budget", kl_budget)
        self.unit = unit
        self.kl_budget = kl_budget
        self.limits = limits = Limits() if limits is None else limits
        self.sinks = tuple(sinks)
        self._failed_sinks: set[int] = set()
        self._step: int | None = None

        kl = f"KL ({unit})"
        start = START_KL[unit] if limits.start_kl is None else limits.start_kl
        negative = NEGATIVE_KL[unit] if limits.negative_kl is None else limits.negative_kl
        self._jump = Jump("kl_jump", kl, limits.jump, "see what changed at this step")
        self._drift = LevelShift("kl_drift", kl, limits.drift, limits.drift_down, limits.jump)
        self._acceleration = Acceleration(limits.acceleration)
        self._sampling_gap = NonzeroGap(limits.sampling_gap, limits.sampling_gap_nats)
        # Detectors by the series they watch. Jump, drift and acceleration are called by `_detect`.
        self._watching: list[tuple[str, SeriesDetector]] = [
            ("kl", StartKL(start, unit)),
            ("kl", NegativeKL(negative, unit, limits.jump)),
            ("entropy", EntropyCollapse(limits.entropy_left, limits.jump)),
            (
                "ratio",
                Ceiling(
                    "ratio_explosion",
                    "the largest importance ratio",
                    limits.ratio,
                    "the policy is far from the one that sampled, or their log-probs disagree",
                ),
            ),
            (
                "grad_norm",
                Jump(
                    "grad_norm_jump",
                    "the gradient norm",
                    limits.jump,
                    "an update may have been large enough to break the policy",
                    upwards_only=True,
                ),
            ),
        ]
        if kl_budget is not None:
            meaning = "raise kl_coef, stop, or go back to an earlier checkpoint"
            self._watching.append(("kl", Ceiling("kl_budget", kl, kl_budget, meaning)))

    @property
    def step(self) -> int | None:
        """The last step that was observed; None before the first."""
        return self._step

    def __repr__(self) -> str:
        sinks = ", ".join(type(sink).__name__ for sink in self.sinks)
        return (
            f"KLMonitor(kl_budget={self.kl_budget}, unit={self.unit!r}, limits={self.limits}, "
            f"sinks=[{sinks}], step={self._step})"
        )

    def observe(
        self,
        step: int,
        *,
        kl: Tensor | float,  # [B, T]
        kl_coef: Tensor | float | None = None,
        entropy: Tensor | float | None = None,  # [B, T]
        logprob: Tensor | None = None,  # [B, T]
        ratio: Tensor | float | None = None,  # [B, T]
        reward: Tensor | float | None = None,  # [B]
        grad_norm: Tensor | float | None = None,
        mask: Tensor | None = None,  # [B, T]
        group: ProcessGroup | None = None,
        cu_seqlens: Tensor | None = None,  # [S + 1]
    ) -> list[Event]:
        """Look at one update. An argument may be None at some steps: it is not watched then.

        In data parallel all ranks must see the same figures, or they disagree about events.
        Either pass tensors of the rank's own sequences with `group`, or numbers that have been
        reduced over the ranks already: numbers are taken as they are, with `group` or without.

        Args:
            step: of training, an integer; not below the step before. 0 means: before any update.
            kl: [B, T] per-token KL to the reference in nats, or a number in the monitor's unit.
            kl_coef: beta, a number; only its being finite is watched.
            entropy: [B, T] nats, whose mean is taken, or a number.
            logprob: [B, T] log-probability of each sampled token under the policy that sampled it,
                before the first step on the batch; row t of the logits it comes from is what token
                t was sampled from. With it, `entropy` is [B, T], of the same logits and at the
                temperature of sampling, and `mask` is True at tokens that the policy sampled.
                None: the sampling gap is not watched.
            ratio: [B, T] importance ratios pi / pi_old, whose largest is taken, or a number.
            reward: [B] the proxy reward of each sequence, or its mean as a number.
            grad_norm: norm of the gradient before clipping, a number.
            mask: [B, T] bool, or numbers that are 0 or 1, for all that is [B, T]; NaN where it is 0
                changes nothing. A batch whose mask leaves no token has no KL, entropy, ratio or gap
                to watch.
            group: data-parallel ranks, which must call this together, with the same inputs as
                tensors.
            cu_seqlens: [S + 1] int32 or int64 of packed sequences, ascending from 0 to N (looked at
                on a CPU alone); all that is [B, T] is then [N] or [1, N]. None: each row is one.

        Returns:
            The events of this step, often none. Their order carries no meaning.

        Raises:
            TypeError, ValueError: a shape or type is wrong, or step is below the one before; the
                monitor is as it was then.
        """
        step = check_integer("step", step)
        if self._step is not None and step < self._step:
            raise ValueError(f"step is {step}, after step {self._step}; steps cannot go back")
        numbers = {"kl_coef": kl_coef, "grad_norm": grad_norm}
        metrics = {k: check_measured(k, v) for k, v in numbers.items() if v is not None}
        per_token = {"kl": kl, "entropy": entropy, "ratio": ratio}
        for name, value in per_token.items():
            if value is not None:
                reduced = self._reduce(name, value, mask, group, cu_seqlens)
                if reduced is not None:
                    metrics[name] = reduced
        sums = None if logprob is None else sums_of_batch(logprob, entropy, mask, group, cu_seqlens)
        if reward is not None:
            metrics["reward"] = _mean_reward(reward, group)
        self._step = step
        events = [*_non_finite(step, metrics), *self._detect(step, metrics)]
        if sums is not None and sums.tokens:
            events += self._detect_gap(step, sums)
            metrics["sampling_gap"] = sums.gap / sums.tokens
            metrics["sampling_gap_error"] = math.sqrt(sums.squares) / sums.tokens
        self._tell(step, metrics, events)
        return events

    def _reduce(
        self,
        name: str,
        value: Tensor | float,
        mask: Tensor | None,
        group: ProcessGroup | None,
        cu_seqlens: Tensor | None,
    ) -> float | None:
        """Reduce [B, T] to a number, None if the mask leaves no token; a number stays as it is."""
        if not isinstance(value, Tensor) or value.ndim == 0:
            return check_measured(name, value)
        sequences_of(name, value, cu_seqlens)
        if mask is None:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, so it needs a mask like it")
        check_like("mask", mask, name, value)
        value = value.detach()
        kept = check_mask("mask", mask)
        if name == "kl":
            return measure_kl(value, kept, self.unit, group, cu_seqlens)
        if not has_tokens(kept, group):
            return None
        if name == "entropy":
            return float(masked_mean(value.double(), kept, group=group))
        # NaN is the largest of all to amax, so it shows; a rank without tokens has no say.
        nothing = value.new_full((1,), -math.inf, dtype=torch.float64)
        largest = torch.cat([nothing, value[kept].double()]).amax()
        return float(largest if group is None else from_all_ranks(largest, group).amax())

    def _detect(self, step: int, metrics: dict[str, float]) -> Iterator[Event]:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        for name, detector in self._watching:
            if name not in finite:
                continue
            if (event := detector.observe(step, finite[name])) is not None:
                yield event
        if "kl" in finite:
            # One change, one event: a detector that reports it makes the other start anew as well.
            if (event := self._jump.observe(step, finite["kl"])) is not None:
                self._drift.reset()
                yield event
            elif (event := self._drift.observe(step, finite["kl"])) is not None:
                self._jump.reset()
                yield event
        if "kl" in finite and "reward" in finite:
            event = self._acceleration.observe_both(step, finite["kl"], finite["reward"])
            if event is not None:
                yield event

    def _detect_gap(self, step: int, sums: GapSums) -> Iterator[Event]:
        if (event := self._sampling_gap.observe_sums(step, sums)) is not None:
            yield event
        if sums.gap != math.inf:  # infinity has an event of its own
            yield from _non_finite(step, {"sampling_gap": sums.gap})

    def _tell(self, step: int, metrics: dict[str, float], events: Sequence[Event]) -> None:
        named = {"kl": f"kl_{self.unit}", "ratio": "ratio_max"}  # as DEFINITIONS in names.py
        metrics = {named.get(name, name): value for name, value in metrics.items()}
        for i, sink in enumerate(self.sinks):
            try:
                sink.log(step, metrics)
                for event in events:
                    sink.alert(event)
            except Exception as error:  # training is worth more than its log
                if i not in self._failed_sinks:
                    self._failed_sinks.add(i)
                    warnings.warn(
                        f"{type(sink).__name__} raised {error!r} at step {step}; training goes on, "
                        "and further failures of this sink are not told",
                        RuntimeWarning,
                        stacklevel=3,
                    )

    def _detectors(self) -> dict[str, Detector]:
        watching = (detector for _, detector in self._watching)
        others = self._jump, self._drift, self._acceleration, self._sampling_gap
        return {d.name: d for d in (*watching, *others)}

    def state_dict(self) -> dict[str, Any]:
        """Return the state that later events depend on, without the constructor's arguments.

        JSON can hold it.
        """
        detectors = {name: d.state_dict() for name, d in self._detectors().items()}
        return {
            "class": type(self).__name__,
            "step": self._step,
            "unit": self.unit,
            "detectors": detectors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state; events are then those of a run that was never interrupted.

        Args:
            state: from `state_dict` of a monitor of the same unit.

        Raises:
            ValueError: the state is not a KLMonitor's, or was saved in another unit or by other
                detectors; the monitor is as it was then.
        """
        check_state(state, type(self).__name__, ("step", "unit", "detectors"))
        before = self.state_dict()
        try:
            self._load(state)
        except (KeyError, TypeError, ValueError) as error:
            self._load(before)
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"state is {state!r:.80}; it must be what KLMonitor.state_dict() returned"
            ) from error

    def _load(self, state: dict[str, Any]) -> None:
        if state["unit"] != self.unit:
            raise ValueError(f"state is in {state['unit']!r}, the monitor in {self.unit!r}")
        detectors = self._detectors()
        if set(state["detectors"]) - {"kl_budget"} != set(detectors) - {"kl_budget"}:
            raise ValueError(
                f"state has detectors {sorted(state['detectors'])}; they must be "
                f"{sorted(detectors)}"
            )
        for name, detector in detectors.items():
            if name in state["detectors"]:  # a budget may be set or dropped on resuming
                detector.load_state_dict(state["detectors"][name])
        self._step = state["step"]


def _mean_reward(reward: Tensor | float, group: ProcessGroup | None) -> float:
    if not isinstance(reward, Tensor) or reward.ndim == 0:
        return check_measured("reward", reward)
    if reward.ndim != 1:
        raise ValueError(f"reward has shape {tuple(reward.shape)}; it must be [B] or a number")
    reward = reward.detach().double()
    return float(masked_mean(reward, torch.ones_like(reward, dtype=torch.bool), group=group))


def _non_finite(step: int, metrics: dict[str, float]) -> Iterator[Event]:
    for name, value in metrics.items():
        if not math.isfinite(value):
            message = f"{name} is {value}; its detectors skip this step"
            yield Event(step, "non_finite", value, sys.float_info.max, message)
