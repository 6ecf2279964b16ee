"""A file is the old one or the new one, whatever happens while it is written."""

import os

import pytest
import torch

from kl_kernels.ppo import checkpoint
from kl_kernels.ppo.checkpoint import (
    create_run,
    load_state,
    open_run,
    restore_rng,
    rng_state,
    save_model,
    save_state,
    write_atomically,
)
from kl_kernels.ppo.config import PPOConfig
from kl_kernels.ppo.report import MetricsLog, read_metrics


class Crash(Exception):
    pass


def test_a_crash_while_writing_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"updates": 1})

    def half(file):
        file.write(b"half of a che")
        raise Crash

    with pytest.raises(Crash):
        write_atomically(path, half)
    assert load_state(path) == {"updates": 1}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch, step):
    path = tmp_path / "checkpoint.pt"
    save_state(path, {"updates": 1})

    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, step, crash)
        with pytest.raises(Crash):
            save_state(path, {"updates": 2})
    assert load_state(path) == {"updates": 1}
    save_state(path, {"updates": 3})
    assert load_state(path) == {"updates": 3}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no folders to flush")
def test_content_reaches_the_disk_before_the_name_and_the_name_before_returning(
    tmp_path, monkeypatch
):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda a, b: (order.append("rename"), replace(a, b))
    )
    save_state(tmp_path / "checkpoint.pt", {})
    assert order == ["fsync", "rename", "fsync"]


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
