"""A run folder holds a whole run, whatever happens while it is written."""

import pytest
import torch

from kl_kernels.lab.ppo.checkpoint import (
    create_run,
    open_run,
    restore_rng,
    rng_state,
    save_model,
)
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.report import MetricsLog, read_metrics


class Crash(Exception):
    pass


def test_a_model_folder_is_complete_or_absent(tmp_path, tiny, monkeypatch):
    lm, tokenizer = tiny

    def crash(*_):
        raise Crash

    monkeypatch.setattr(tokenizer, "save_pretrained", crash)
    with pytest.raises(Crash):
        save_model(tmp_path / "reference", lm, tokenizer)
    assert not (tmp_path / "reference").exists()


def test_random_numbers_go_on_where_they_were():
    state = rng_state()
    first = torch.rand(5)
    restore_rng(state)
    assert torch.equal(torch.rand(5), first)


def test_metrics_after_the_checkpoint_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, keep=0)
    for update in (1, 2, 3):
        log.append({"update": update})
    with open(path, "a") as file:
        file.write('{"update": 4, "pro')  # the process died here
    MetricsLog(path, keep=2).append({"update": 3, "again": True})
    assert read_metrics(path) == [{"update": 1}, {"update": 2}, {"update": 3, "again": True}]


def test_lost_metrics_are_noticed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog(path, keep=0).append({"update": 1})
    with pytest.raises(ValueError, match="1 lines"):
        MetricsLog(path, keep=2)


def test_a_run_folder_gives_its_configuration_back(tmp_path):
    config = PPOConfig(kl_coef=0.125, controller="fixed", seed=7)
    create_run(tmp_path / "a" / "run", config)
    assert open_run(tmp_path / "a" / "run")[1] == config


def test_an_existing_run_is_not_overwritten(tmp_path):
    create_run(tmp_path, PPOConfig())
    with pytest.raises(ValueError, match=r"already exists.*--resume"):
        create_run(tmp_path, PPOConfig())


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        create_run(tmp_path / "file" / "run", PPOConfig())


def test_a_folder_without_a_run_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint"):
        open_run(tmp_path)
    (tmp_path / "config.json").write_text('{"kl_coefficient": 1}')
    with pytest.raises(ValueError, match="kl_coefficient"):
        open_run(tmp_path)
