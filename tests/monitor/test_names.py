"""Names of metrics: those of a trainer only for what the trainer logs under them."""

from pathlib import Path

import pytest

from kl_kernels.monitor.names import DEFINITIONS, NAMES, rename

ALL = {name: float(i) for i, name in enumerate(DEFINITIONS)}


def test_our_own_names_stay():
    assert rename(ALL, "kl_kernels") == ALL


@pytest.mark.parametrize("names", NAMES)
def test_nothing_is_lost_and_no_two_metrics_share_a_name(names):
    renamed = rename({**ALL, "other": -1.0}, names)
    assert sorted(renamed.values()) == sorted([*ALL.values(), -1.0])


@pytest.mark.parametrize("names", NAMES)
def test_only_defined_metrics_are_mapped(names):
    assert set(NAMES[names]) <= set(DEFINITIONS)


@pytest.mark.parametrize("names", [n for n in NAMES if n != "kl_kernels"])
def test_what_a_trainer_does_not_log_cannot_be_taken_for_what_it_does(names):
    theirs = set(NAMES[names].values())
    for name, renamed in zip(ALL, rename(ALL, names)):
        assert renamed in theirs or renamed == f"kl_kernels/{name}"
    # A KL without a unit has no trainer's name; OpenRLHF's "kl" is a third unit.
    assert rename({"kl": 1.0}, names) == {"kl_kernels/kl": 1.0}


def test_the_unit_of_kl_decides_the_name():
    both = {"kl_token_mean": 1.0, "kl_sequence_sum": 2.0}
    assert rename(both, "trl") == {"kl": 1.0, "objective/kl": 2.0}
    assert rename(both, "verl") == {"actor/kl_loss": 1.0, "kl_kernels/kl_sequence_sum": 2.0}
    assert set(rename(both, "openrlhf")) == {
        "kl_kernels/kl_token_mean",
        "kl_kernels/kl_sequence_sum",
    }


def test_the_estimator_of_a_step_decides_the_name():
    both = {"approx_kl": 1.0, "approx_kl_k1": 2.0}  # theirs is the mean log-ratio, k1
    assert rename(both, "verl") == {"kl_kernels/approx_kl": 1.0, "actor/ppo_kl": 2.0}
    assert rename(both, "openrlhf") == {"kl_kernels/approx_kl": 1.0, "ppo_kl": 2.0}


def test_a_prefix_comes_before_every_name():
    assert rename({"reward": 1.0, "x": 2.0}, "trl", "train/") == {
        "train/reward": 1.0,
        "train/kl_kernels/x": 2.0,
    }


def test_other_names_are_refused():
    with pytest.raises(ValueError, match="names is 'TRL'; accepted: 'kl_kernels', 'trl', 'verl'"):
        rename({}, "TRL")


def test_the_table_in_the_docs_is_the_one_in_the_code():
    docs = Path(__file__).parents[2] / "docs" / "audit.md"
    lines = docs.read_text(encoding="utf-8").split("| ours | TRL |")[1].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = rows[: rows.index([""])]
    for column, names in enumerate(("trl", "verl", "openrlhf"), 1):
        assert {row[0]: row[column] for row in rows if row[column]} == NAMES[names]
