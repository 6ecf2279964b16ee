"""The published study holds all that its pictures are drawn from."""

import importlib
import json
from pathlib import Path

import pytest
from letters import check_letters

from kl_kernels.lab.study.analysis import analyse_records
from kl_kernels.lab.study.figures import pictures

HERE = Path(__file__).parent


@pytest.fixture(scope="module", autouse=True)
def bench_study():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HERE.parents[1])
        patch.syspath_prepend(HERE.parent / "lab" / "study")
        yield importlib.import_module("bench.quality.study")


@pytest.fixture(scope="module")
def data(bench_study):
    synthetic = importlib.import_module("synthetic")
    records, estimates = synthetic.as_expected(), synthetic.estimates()
    return json.loads(json.dumps(analyse_records(synthetic.CONSTANTS, records, estimates)))


def test_text_and_back_changes_only_the_sixth_digit_of_curves(data, bench_study):
    back = json.loads(bench_study.as_text(bench_study.published(data)))
    assert back.keys() == data.keys()
    assert back["table"] == data["table"]
    for beta, curve in data["curves"].items():
        assert back["curves"][beta]["gold"]["mean"] == pytest.approx(
            curve["gold"]["mean"], rel=1e-4
        )


def test_a_list_of_numbers_is_a_line(data, bench_study):
    text = bench_study.as_text(bench_study.published(data))
    assert max(map(len, text.splitlines())) > 300
    assert len(text.splitlines()) < 4000


def test_pictures_are_drawn_from_the_published_text(data, bench_study, tmp_path, monkeypatch):
    monkeypatch.setattr(bench_study, "PICTURES", tmp_path)
    (tmp_path / "old.png").write_bytes(b"")
    bench_study.publish_pictures(json.loads(bench_study.as_text(bench_study.published(data))))
    assert {path.stem for path in tmp_path.iterdir()} == {
        "overoptimisation",
        "learning_curves",
        "control",
        "estimators",
    }


def test_letters_of_a_picture_400_pixels_wide_are_8_pixels_high(data):
    for figure in pictures(data).values():
        check_letters(figure)
