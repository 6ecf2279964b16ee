"""A bar estimates the time left from updates alone, not from the time before the first one."""

import pytest

from kl_kernels.lab.ppo import progress
from kl_kernels.lab.ppo.progress import UpdateProgress


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("done", [0, 30])
def test_the_rest_is_told_after_two_updates_and_leaves_out_the_first(clock, done):
    with UpdateProgress(total=done + 120, initial=done, desc="PPO") as bar:
        assert "<?, ?update/s" in str(bar)
        clock[0] += 84  # pretraining, and an update that waits for memory
        bar.reach(done + 1, "said")
        assert f"{done + 1}/{done + 120}" in str(bar)
        assert "<?, ?update/s, said]" in str(bar)
        clock[0] += 2
        bar.reach(done + 2, "said")
        assert "<03:56,  2.00s/update" in str(bar)  # 118 of 2 s
        clock[0] += 1
        bar.reach(done + 3, "said")
        assert "<02:55,  1.50s/update" in str(bar)  # 117 of 1.5 s


def test_waiting_for_an_update_changes_no_rate(clock):
    with UpdateProgress(total=10, desc="study") as bar:
        for n in (1, 2):
            clock[0] += 2
            bar.reach(n, "")
        before = bar.format_dict["rate"]
        clock[0] += 50
        bar.reach(2, "another run")
        assert bar.format_dict["rate"] == before == 0.5


def test_updates_lost_by_a_run_that_was_killed_are_not_counted_back(clock):
    with UpdateProgress(total=10, desc="study") as bar:
        bar.reach(5, "")
        bar.reach(4, "")
        assert bar.n == 5
