"""Pictures of the benchmark page can be read on a phone."""

import importlib

import pytest
from letters import check_letters
from matplotlib.figure import Figure


@pytest.fixture
def report(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath)
    return importlib.import_module("bench.common.report")


def test_letters_are_8_pixels_high_where_a_picture_is_400_wide(report, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    for name, module in report.parts().items():
        importlib.import_module(module).pictures(report.read(name))
    assert len(figures) >= 7
    for figure in figures:
        check_letters(figure)
