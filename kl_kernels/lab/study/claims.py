"""Conclusions: sentences whose numbers, and whose verdicts, come from the runs.

A verdict can be that a claim does not hold, or that the study lacks the runs to test it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kl_kernels.lab.study.outcomes import Outcome, best_beta
from kl_kernels.lab.study.plan import ADAPTIVE
from kl_kernels.lab.study.statistics import Interval, interval_of, mean_interval

Outcomes = Mapping[str, Sequence[Outcome]]

CLEAR = 1.0  # gold points: six standard errors of a batch's mean; a good answer has 4 to 5
GOOD_FIT = 0.8  # R^2
VERY_LARGE = 2.0  # beta, against scores that vary by about 1
HELD_KL = 1.5  # nats per answer
NEAR_GOLD = 0.5  # points
NEAR_LENGTH = 0.15  # relative
NEAR_TARGET = 0.2  # relative
KEPT = 0.8  # part of the gold that is lost without a penalty


@dataclass(frozen=True)
class Claim:
    """A claim; `holds` is None where the study lacks the runs to test it."""

    claim: str
    holds: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "does not hold", None: "not tested"}[self.holds]

    def __str__(self) -> str:
        return f"{self.claim}: {self.verdict}. {self.evidence}"


def conclusions(
    outcomes: Outcomes,
    kl_target: float,
    fits: Mapping[str, Any] | None,
    estimators: Mapping[str, Any],
) -> list[Claim]:
    """Judge every claim that the study has any runs for."""
    claims = []
    numbers = [beta for beta in outcomes if beta != ADAPTIVE]
    if "0" in outcomes:
        claims.append(no_penalty_is_hacked(outcomes["0"]))
        if any(beta != "0" for beta in numbers):
            claims.append(moderate_beta_ends_higher(outcomes))
    if numbers and float(max(numbers, key=float)) >= VERY_LARGE:
        claims.append(very_large_beta_stays(outcomes))
    if ADAPTIVE in outcomes:
        claims.append(target_is_held(outcomes[ADAPTIVE], kl_target))
        if "0" in outcomes:
            claims.append(lost_gold_is_kept(outcomes["0"], outcomes[ADAPTIVE]))
    claims.append(weak_penalty_loses_gold(outcomes))
    if fits:
        claims.append(gold_follows_gao(fits))
    if estimators:
        claims.append(exact_varies_least(estimators))
    return claims


def no_penalty_is_hacked(runs: Sequence[Outcome]) -> Claim:
    rise = over(runs, lambda r: r.end["proxy"] - r.start["proxy"])
    drop = over(runs, lambda r: r.gold_drop)
    peak = over(runs, lambda r: r.gold_peak)
    update, kl = (fmean(getattr(r, name) for r in runs) for name in ("peak_update", "peak_kl"))
    return Claim(
        "Without a penalty (beta = 0) the proxy rises while gold ends clearly below its own peak",
        is_clear(rise) and is_clear(drop),
        f"Proxy {both_ends(runs, 'proxy')}; gold starts at {over(runs, start_of('gold'))}, peaks "
        f"at {peak} (around update {update:.0f}, {kl:.0f} nats) and ends at "
        f"{over(runs, end_of('gold'))}, a drop of {drop}. The peak is the highest of "
        "many noisy values, so it is biased up, and the drop with it.",
    )


def moderate_beta_ends_higher(outcomes: Outcomes) -> Claim:
    numbers = {b: runs for b, runs in outcomes.items() if b != ADAPTIVE}
    best = best_beta(numbers) or "0"
    gain = paired(numbers[best], numbers["0"], end_of("gold"))
    penalties = sorted((b for b in numbers if b != "0"), key=float)
    at_the_end = len(penalties) > 1 and best == penalties[-1]
    where = ", the largest that was tried, which is not moderate" if at_the_end else ""
    return Claim(
        "A moderate beta ends with clearly higher gold than none",
        is_clear(gain) and not at_the_end,
        f"Of {', '.join(penalties)} the highest gold at the end is that of beta = {best}{where}: "
        f"{over(numbers[best], end_of('gold'))}, seed by seed {gain} more than without. "
        "It was chosen for being highest, so this too is biased up.",
    )


def very_large_beta_stays(outcomes: Outcomes) -> Claim:
    beta = max((b for b in outcomes if b != ADAPTIVE), key=float)
    runs = outcomes[beta]
    kl = max(run.largest_kl for run in runs)
    gold = fmean(r.end["gold"] - r.start["gold"] for r in runs)
    length = fmean(r.end["length"] / r.start["length"] - 1 for r in runs)
    return Claim(
        f"A very large beta ({beta}) stays where it started: under {HELD_KL} nats per answer, gold "
        f"within {NEAR_GOLD} points and length within {NEAR_LENGTH:.0%}",
        kl < HELD_KL and abs(gold) <= NEAR_GOLD and abs(length) <= NEAR_LENGTH,
        f"The largest KL of any update is {kl:.2f} nats; gold {both_ends(runs, 'gold')} "
        f"({gold:+.2f}), length {both_ends(runs, 'length')} tokens ({length:+.0%}).",
    )


def target_is_held(runs: Sequence[Outcome], target: float) -> Claim:
    means = [run.last_third_kl / target - 1 for run in runs]
    low = min(run.last_third_kl_range[0] for run in runs) / target - 1
    high = max(run.last_third_kl_range[1] for run in runs) / target - 1
    return Claim(
        f"The adaptive controller holds its target of {target:g} nats: the mean KL over the last "
        f"third of the updates is within {NEAR_TARGET:.0%} of it in every seed",
        all(abs(mean) <= NEAR_TARGET for mean in means),
        f"It is off by {', '.join(f'{mean:+.0%}' for mean in means)}; single "
        f"updates by {low:+.0%} to {high:+.0%}.",
    )


def lost_gold_is_kept(without: Sequence[Outcome], adaptive: Sequence[Outcome]) -> Claim:
    gain = paired(adaptive, without, end_of("gold"))
    lost = fmean(run.gold_drop for run in without)
    kept = gain.mean / lost if lost > 0 else 0.0
    return Claim(
        f"Adaptive beta keeps the gold that beta = 0 loses (at least {KEPT:.0%} of it)",
        is_clear(gain) and kept >= KEPT,
        f"Gold ends at {over(adaptive, end_of('gold'))}, seed by seed {gain} above beta = 0, which "
        f"lost {lost:.2f} from its peak: {kept:.0%} of that. This does not say that it "
        "beats stopping beta = 0 early, had one known when.",
    )


def weak_penalty_loses_gold(outcomes: Outcomes) -> Claim:
    penalties = sorted((b for b in outcomes if b not in ("0", ADAPTIVE)), key=float)
    claim = "A penalty that is too weak still ends clearly below its gold peak"
    if "0" not in outcomes or not penalties:
        return Claim(claim, None, "That takes runs with beta = 0 and with small fixed ones.")
    drops = {b: over(outcomes[b], lambda r: r.gold_drop) for b in ["0", *penalties]}
    weak = [b for b in penalties if is_clear(drops[b])]
    listed = ", ".join(f"{drop} at beta = {b}" for b, drop in drops.items())
    return Claim(
        claim,
        is_clear(drops["0"]) and bool(weak),
        f"Gold lost from its peak: {listed}. Either way a KL penalty is necessary, not sufficient: "
        "it buys time and a drift that can be watched, and does not make a bad reward good.",
    )


def gold_follows_gao(fits: Mapping[str, Any]) -> Claim:
    gold, proxy = fits["gold"], fits["proxy"]
    fitted = "has no peak" if gold["peak_kl"] is None else f"peaks at {gold['peak_kl']:.0f} nats"
    follows = (
        proxy["r_squared"] >= GOOD_FIT
        and proxy["peak_kl"] is not None
        and proxy["peak_kl"] <= fits["largest_kl"]
    )
    proxy_peak = "no peak" if proxy["peak_kl"] is None else f"a peak at {proxy['peak_kl']:.3g} nats"
    return Claim(
        f"Gold at beta = 0 follows d (alpha - beta log d), d = sqrt(KL), with R^2 of at least "
        f"{GOOD_FIT:g}",
        gold["r_squared"] >= GOOD_FIT and gold["peak_kl"] is not None,
        f"alpha = {gold['alpha']:.2f}, beta = {gold['beta']:.2f}, R^2 = {gold['r_squared']:.2f}; "
        f"the fit {fitted}, the runs at {fits['observed_peak_kl']:.0f}. The same "
        f"form fitted to the proxy (R^2 = {proxy['r_squared']:.2f}) has {proxy_peak}, and the runs "
        f"go to {fits['largest_kl']:.0f}: the proxy "
        + ("turns over as well." if follows else "does not turn over on the way."),
    )


def exact_varies_least(estimators: Mapping[str, Any]) -> Claim:
    levels = sorted(estimators.values(), key=lambda level: level["kl"]["mean"])
    parts, least = [], True
    for level in levels:
        by = {n: interval_of(e["variance_ratio"]) for n, e in level["estimators"].items()}
        least &= all(ratio.low is not None and ratio.low > 1 for ratio in by.values())
        listed = ", ".join(f"{n} {times(ratio)}" for n, ratio in by.items())
        parts.append(f"at {level['kl']['mean']:.3g} nats {listed}")
    return Claim(
        "Exact KL per token has the lowest variance of all estimators at every level of KL",
        least,
        f"Variances as multiples of exact's (95 % bootstrap intervals): {'; '.join(parts)}.",
    )


def times(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.mean:.3g}"
    return f"{ratio.mean:.3g} ({ratio.low:.3g} to {ratio.high:.3g})"


def what_is_clear(n_seeds: int) -> str:
    interval = ", and its 95 % interval over seeds is above 0" if n_seeds > 1 else ""
    return f"A difference is called clear where it is more than {CLEAR:g} point{interval}."


def is_clear(difference: Interval) -> bool:
    return difference.mean > CLEAR and (difference.low is None or difference.low > 0)


def over(runs: Sequence[Outcome], number: Any) -> Interval:
    return mean_interval([number(run) for run in runs])


def paired(a: Sequence[Outcome], b: Sequence[Outcome], number: Any) -> Interval:
    """Return the mean difference, seed by seed: runs of the same seed share their start."""
    return mean_interval(np.array([number(x) - number(y) for x, y in zip(a, b)]))


def start_of(name: str) -> Any:
    return lambda run: run.start[name]


def end_of(name: str) -> Any:
    return lambda run: run.end[name]


def both_ends(runs: Sequence[Outcome], name: str) -> str:
    return f"{over(runs, start_of(name))} → {over(runs, end_of(name))}"
