"""Pictures of the benchmark page can be read on a phone."""

import importlib

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text


@pytest.fixture
def report(monkeypatch, request):
    monkeypatch.syspath_prepend(request.config.rootpath / "bench")
    return importlib.import_module("report")


def test_letters_are_8_pixels_high_where_a_picture_is_400_wide(report, monkeypatch):
    """A point is 1/72 inch."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: (figures.append(f), save(f, *a, **k)))
    for name, module in report.parts().items():
        importlib.import_module(module).pictures(report.read(name))
    assert len(figures) >= 7
    for figure in figures:
        pixels_per_point = 400 / figure.get_size_inches()[0] / 72
        for text in figure.findobj(Text):
            if text.get_text().strip():
                assert text.get_fontsize() * pixels_per_point > 8, text.get_text()
