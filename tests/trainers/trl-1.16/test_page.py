"""The code of docs/how-to/trl.md, as it stands there."""

import pytest
from patches import code_of
from test_callback import make_trainer
from tiny import folder
from transformers import TrainerCallback

__all__ = ["folder"]


@pytest.mark.exercises("the code of the how-to page")
def test_the_how_to_page(folder, tmp_path, monkeypatch, request):
    monkeypatch.chdir(tmp_path)
    trainer = make_trainer(folder, tmp_path, TrainerCallback(), max_steps=2)
    exec(code_of(request, "trl.md"), {"trainer": trainer})
    assert trainer.state.global_step == 2
    assert (tmp_path / "audit.jsonl").read_text().count("\n") == 3  # header, two steps
