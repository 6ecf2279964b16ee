"""Conclusions follow the data: each claim has data that bears it out and data that does not."""

import pytest
from synthetic import CONSTANTS, as_expected, estimates, hacked, run

from kl_kernels.lab.study.analysis import analyse_records
from kl_kernels.lab.study.outcomes import outcome
from kl_kernels.lab.study.statistics import Interval

CLAIMS = {
    "hacked": "Without a penalty",
    "moderate": "A moderate beta",
    "large": "A very large beta",
    "target": "The adaptive controller",
    "kept": "Adaptive beta keeps",
    "not enough": "A penalty that is too weak",
    "gao": "Gold at beta = 0 follows",
    "exact": "Exact KL per token",
}


def claims(records, of_estimators=None):
    data = analyse_records(CONSTANTS, records, of_estimators or estimates())
    found = {}
    for claim in data["claims"]:
        (name,) = [name for name, start in CLAIMS.items() if claim["claim"].startswith(start)]
        found[name] = claim
    return found


def test_every_claim_can_hold():
    found = claims(as_expected())
    assert found.keys() == CLAIMS.keys()
    assert {name: claim["holds"] for name, claim in found.items()} == dict.fromkeys(CLAIMS, True)


WITHOUT_EFFECT = {
    "hacked": {"0": [run(gold_end=5.0, proxy_end=10.0, kl_end=200.0)] * 3},
    "moderate": {"0.03": [hacked()] * 3, "0.1": [hacked()] * 3},
    "large": {"5": [run(gold_end=2.0, kl_end=1.6)] * 3},
    "target": {"adaptive": [run(gold_end=5.0, kl_end=25.0)] * 3},
    "kept": {"adaptive": [run(gold_end=3.0)] * 3},
    "not enough": {"0.03": [run(gold_end=5.0)] * 3},
}


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_every_claim_can_fail(name):
    assert claims(as_expected() | WITHOUT_EFFECT[name])[name]["holds"] is False


@pytest.mark.parametrize(
    "changes", [{"gold_end": 2.6}, {"gold_end": 2.0, "length_end": 20.0}], ids=["gold", "length"]
)
def test_a_very_large_beta_has_to_leave_everything_as_it_was(changes):
    records = as_expected() | {"5": [run(kl_end=0.3, **changes)] * 3}
    assert claims(records)["large"]["holds"] is False


def test_a_proxy_that_does_not_rise_is_not_hacked():
    fallen = run(gold_peak=5.0, gold_end=-2.0, proxy_end=0.5, kl_end=200.0)
    assert claims(as_expected() | {"0": [fallen] * 3})["hacked"]["holds"] is False


def test_one_seed_off_makes_an_interval_reach_below_zero():
    """Drops x, x, 0: their mean is 2 x / 3, the interval 4.303 x / 3 to either side."""
    drop = outcome(hacked()).gold_drop
    records = as_expected() | {"0": [hacked(), hacked(), run(gold_end=5.0, proxy_end=10.0)]}
    claim = claims(records)["hacked"]
    assert claim["holds"] is False
    mean, half = Interval(2 * drop / 3, None, None), Interval(4.30265 * drop / 3, None, None)
    assert f"a drop of {mean} ± {half}" in claim["evidence"]


def test_the_largest_beta_is_not_moderate():
    records = {"0": [hacked()] * 3, "0.1": [run(gold_end=4.0)] * 3, "5": [run(gold_end=5.0)] * 3}
    claim = claims(records)["moderate"]
    assert claim["holds"] is False
    assert "beta = 5, the largest that was tried" in claim["evidence"]


def test_a_target_has_to_be_held_in_every_seed():
    seeds = [run(gold_end=5.0, kl_end=kl) for kl in (20.0, 20.0, 15.0)]
    claim = claims(as_expected() | {"adaptive": seeds})["target"]
    assert claim["holds"] is False
    assert "It is off by +0%, +0%, -25%" in claim["evidence"]


def test_gold_that_does_not_turn_over_does_not_follow_gao():
    rising = run(gold_end=30.0, proxy_end=30.0, kl_end=200.0)
    claim = claims(as_expected() | {"0": [rising] * 3})["gao"]
    assert claim["holds"] is False


def test_the_proxy_is_said_to_turn_over_only_where_it_does():
    assert "does not turn over" in claims(as_expected())["gao"]["evidence"]
    fallen = [dict(r, proxy=r["gold"]) for r in hacked()]
    assert "turns over as well" in claims({"0": [fallen] * 3})["gao"]["evidence"]


@pytest.mark.parametrize("ratio", [(1.2, 0.9, 1.4), (0.5, 0.4, 0.6)])
def test_exact_is_not_best_where_the_interval_reaches_one(ratio):
    assert claims(as_expected(), estimates(ratio))["exact"]["holds"] is False


def test_two_runs_of_one_seed():
    """The runs of `make ppo` have no interval, and no small beta to see fail."""
    found = claims({"0": [hacked()], "adaptive": [run(gold_end=4.8)]})
    expected = dict.fromkeys(("hacked", "target", "kept", "not enough", "gao", "exact"), True)
    holds = {name: claim["holds"] for name, claim in found.items()}
    assert holds == expected | {"not enough": None}
    assert "±" not in "".join(claim["evidence"] for claim in found.values())


def test_numbers_in_the_evidence_are_the_data_s():
    evidence = claims({"0": [hacked()], "adaptive": [run(gold_end=4.8)]})["kept"]["evidence"]
    assert "Gold ends at 4.80, seed by seed 6.80 above beta = 0" in evidence
    assert "beats stopping beta = 0 early" in evidence
