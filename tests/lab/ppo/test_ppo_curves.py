"""The picture of a run: whole updates, plain numbers, a title, and letters that can be read."""

import pytest
from letters import check_letters

from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.report import curves


def records(n, beta=0.1):
    names = ("proxy", "gold", "kl", "entropy")
    return [
        {"update": i + 1, "kl_coef": beta} | {name: i / 7 + j for j, name in enumerate(names)}
        for i in range(n)
    ]


def drawn(n):
    figure = curves(PPOConfig(controller="fixed", kl_coef=0.1, seed=3), records(n))
    figure.canvas.draw()
    return figure


@pytest.mark.parametrize("n", [1, 2, 3, 120])
def test_updates_are_whole_and_numbers_plain(n):
    for axes in drawn(n).axes:
        for tick in axes.xaxis.get_majorticklabels():
            assert "." not in tick.get_text()
        assert axes.yaxis.get_offset_text().get_text() == ""


def test_the_title_tells_which_run_it_is():
    title = drawn(3).get_suptitle()
    assert "embedded task" in title
    assert "seed 3" in title
    assert "3 updates" in title


def test_letters_are_8_pixels_high_where_the_picture_is_400_wide():
    check_letters(drawn(3))
