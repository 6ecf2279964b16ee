"""The command as a newcomer meets it: the files it leaves, and its words when it refuses."""

import dataclasses
import json
import re
import sys

import pytest
import torch
from micro import MICRO, parse, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kl_kernels.lab.ppo import loop
from kl_kernels.lab.ppo.checkpoint import load_state
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.report import read_metrics
from kl_kernels.monitor.hashes import model_hash
from kl_kernels.monitor.verify import verify_log

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_embedded_task_end_to_end(tmp_path, capsys):
    """Run pretraining, reward model, updates and report, all tiny."""
    out = tmp_path / "run"
    tiny = ["--hidden-size", "8", "--layers", "1", "--vocab-size", "400", "--pretrain-steps", "3"]
    assert run(*MICRO, *tiny, "--out", out, "--updates", "3", "--seed", "3") == 0

    records = read_metrics(out / "metrics.jsonl")
    assert [record["update"] for record in records] == [1, 2, 3]
    assert {"proxy", "gold", "kl", "kl_coef", "entropy", "length", "sample"} <= records[0].keys()
    assert (out / "curves.png").read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert (out / "table.txt").read_text() in printed
    assert all(word in printed for word in ("update", "proxy", "gold", "KL", "beta", "entropy"))
    assert not list(out.glob("*.partial"))

    verdict = verify_log(out / "audit.jsonl")
    assert verdict.ok
    audited = [json.loads(line) for line in (out / "audit.jsonl").read_text().splitlines()]
    header, updates, checkpoints = (
        [record["data"] for record in audited if record["kind"] == kind]
        for kind in ("header", "update", "checkpoint")
    )
    assert header[0]["header"]["config"] == json.loads((out / "config.json").read_text())
    assert header[0]["versions"]["torch"] == torch.__version__
    for update, record in zip(updates, records, strict=True):
        assert record.items() <= update.items()
    (drift,) = (record["data"] for record in audited if record["kind"] == "drift")
    assert drift == json.loads((out / "drift.json").read_text())
    assert drift["kl"] / 8 == pytest.approx(records[-1]["kl"])  # 8 answers
    assert repr(drift["tokens"][0]["text"]) in printed
    saved = load_state(out / "checkpoint.pt")
    assert checkpoints[-1] == {"updates": 3, "policy": model_hash(saved["policy"])}
    assert len({checkpoint["policy"] for checkpoint in checkpoints}) == 3

    # More updates in the same folder, then the trained policy as the start of another run.
    assert run("--resume", out, "--updates", "4") == 0
    assert read_metrics(out / "metrics.jsonl")[:3] == records
    assert len(read_metrics(out / "metrics.jsonl")) == 4
    assert verify_log(out / "audit.jsonl").ok
    again = tmp_path / "again"
    assert run(*MICRO, "--model", out / "policy", "--out", again, "--updates", "1") == 0


def test_own_model_prompts_and_reward(tmp_path, model_folder, monkeypatch):
    (tmp_path / "own_reward.py").write_text(
        "def shorter(prompts, answers):\n"
        "    assert {'A class', 'The value of an object'} >= set(prompts)\n"
        "    return [-len(answer) / 10 for answer in answers]\n"
    )
    (tmp_path / "prompts.txt").write_text("A class\n\nThe value of an object\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    arguments = ["--model", model_folder, "--prompts", "prompts.txt", "--out", "run"]
    assert run(*MICRO, *arguments, "--reward", "own_reward:shorter", "--updates", "2") == 0
    assert [record["gold"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [
        None,
        None,
    ]


def test_a_run_whose_audit_log_was_edited_is_not_continued(tmp_path, model_folder, monkeypatch):
    (tmp_path / "any_reward.py").write_text("def one(prompts, answers):\n    return [1] * 8\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model", model_folder, "--out", tmp_path / "run", "--reward", "any_reward:one"]
    assert run(*MICRO, *arguments, "--updates", "1") == 0
    audit = tmp_path / "run" / "audit.jsonl"
    audit.write_text(audit.read_text().replace('"proxy":1.0', '"proxy":9.0'))
    with pytest.raises(ValueError, match=r"audit.jsonl' cannot be continued \(edited\): line 2"):
        run("--resume", tmp_path / "run", "--updates", "2")


def test_a_dashboard_gets_the_run_under_a_trainer_s_names(tmp_path, model_folder, monkeypatch):
    (tmp_path / "any_reward.py").write_text("def one(prompts, answers):\n    return [1] * 8\n")
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model", model_folder, "--out", tmp_path / "run", "--reward", "any_reward:one"]
    arguments += ["--log-to", "tensorboard", "--metric-names", "trl", "--updates", "2"]
    assert run(*MICRO, *arguments) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [point.step for point in events.Scalars("objective/kl")] == [0, 1]
    assert [point.value for point in events.Scalars("reward")] == [1.0, 1.0]


def test_ctrl_c_tells_how_to_go_on(tmp_path, model_folder, monkeypatch, capsys):
    (tmp_path / "ctrl_c.py").write_text(
        "def stop(prompts, answers):\n    raise KeyboardInterrupt\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model", model_folder, "--out", tmp_path / "run", "--reward", "ctrl_c:stop"]
    assert run(*MICRO, *arguments) == 130
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/folder"], "model is 'no/such/folder'"),
        (["--prompts", "no/such/file"], "prompts is 'no/such/file'"),
        (["--reward", "nowhere:f"], "reward is 'nowhere:f'"),
        (["--resume", "no/such/run"], "resume is 'no/such/run', which holds no checkpoint"),
        (["--kl-estimator", "k4"], "kl_estimator is 'k4'; accepted: 'exact', 'k1', 'k2'"),
        *(
            (
                ["--kl-in", place, "--kl-estimator", name],
                f"kl_estimator is '{name}', whose expected policy gradient in the {place} is not "
                "that of the KL",
            )
            for place, names in {"reward": ("k2", "k3", "abs"), "loss": ("k1", "k3", "abs")}.items()
            for name in names
        ),
        (["--controller", "pid"], "controller is 'pid'; accepted: 'adaptive', 'fixed'"),
        (["--controller", "pi", "--kl-coef", "0"], "kl_coef is 0, which cannot adapt"),
        (["--overlong-buffer", "41"], "overlong_buffer is 41; it must be at most answer_tokens"),
        (["--max-ratio", "0.5"], "max_ratio is 0.5; it must be above 1"),
        (
            ["--max-ratio", "2", "--constraint", "warn"],
            "constraint is 'warn'; accepted: 'log', 'skip'",
        ),
        (["--kl-coef", "-1"], "kl_coef is -1.0; it must be at least 0"),
        (["--kl-coef", "nan"], "kl_coef is nan; it must be a finite number"),
        (["--kl-coef", "0"], "kl_coef is 0, which cannot adapt"),
        (
            ["--controller", "adaptive", "--kl-horizon", "10"],
            "kl_horizon is 10; it must be at least batch_size",
        ),
        (["--gamma", "1.5"], "gamma is 1.5; it must be at most 1"),
        (["--adam-beta1", "1"], "adam_beta1 is 1.0; it must be below 1"),
        (["--updates", "0"], "updates is 0; it must be at least 1"),
        (["--batch-size", "62"], "batch_size is 62; it must be a multiple of minibatches"),
        (["--hidden-size", "20"], "hidden_size is 20; it must be a multiple of 8"),
        (["--answer-tokens", "60"], "context is 64; it must hold prompt_tokens"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_leaves_no_folder(tmp_path, arguments, message):
    out = [] if "--resume" in arguments else ["--out", tmp_path / "run"]
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        run(*arguments, *out)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_exists_or_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="already exists"):
        run("--out", tmp_path)
    with pytest.raises(ValueError, match="cannot be written"):
        run("--out", tmp_path / "file" / "run")


def test_resuming_with_other_constants_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(PPOConfig().to_json())
    with pytest.raises(ValueError, match="only updates may be given"):
        run("--resume", tmp_path, "--kl-coef", "1")


@pytest.fixture
def finished(tmp_path, model_folder, monkeypatch):
    """Finish a run of three updates whose scores, and so the controller's steps, are NumPy's."""
    (tmp_path / "of_numpy.py").write_text(
        "import numpy as np\n"
        "def length(prompts, answers):\n"
        "    return np.array([len(a) / 10 for a in answers], np.float32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--model", model_folder, "--reward", "of_numpy:length", "--updates", "3"]
    options += ["--controller", "adaptive", "--learning-rate", "3e-3"]
    assert run(*MICRO, *options, "--out", tmp_path / "run") == 0
    return tmp_path / "run", [*MICRO, *options]


def contents(folder):
    """Read the results of a run, but for the time it took."""
    records = read_metrics(folder / "metrics.jsonl")
    for record in records:
        del record["seconds"]
    return records, (folder / "policy" / "model.safetensors").read_bytes()


def test_a_finished_run_is_resumed_to_what_it_was(finished, capsys):
    folder, _ = finished
    before = contents(folder)
    for _ in range(2):
        assert run("--resume", folder) == 0
        assert contents(folder) == before
        assert "KL per answer" in capsys.readouterr().out
    assert verify_log(folder / "audit.jsonl").ok


def test_a_run_resumed_twice_with_more_updates_is_one_that_had_them_at_once(finished, tmp_path):
    folder, options = finished
    assert run("--resume", folder, "--updates", "4") == 0
    assert run("--resume", folder, "--updates", "6") == 0
    assert json.loads((folder / "config.json").read_text())["updates"] == 6
    whole = tmp_path / "whole"
    assert run(*options, "--updates", "6", "--out", whole) == 0
    assert contents(folder) == contents(whole)
    coefficients = [record["kl_coef"] for record in read_metrics(folder / "metrics.jsonl")]
    assert len(set(coefficients)) == 6, "the controller adapts at every update"


def test_a_run_cannot_be_resumed_with_fewer_updates_than_it_has(finished):
    folder, _ = finished
    config, before = (folder / "config.json").read_text(), contents(folder)
    with pytest.raises(ValueError, match=r"^updates is 2, but the run in '.*' has done 3"):
        run("--resume", folder, "--updates", "2")
    assert (folder / "config.json").read_text() == config
    assert contents(folder) == before


def test_a_run_killed_behind_its_last_checkpoint_can_be_finished(finished, monkeypatch):
    """The rest of the report comes from the folder, as nothing is sampled again."""
    folder, _ = finished

    class Killed(BaseException):
        pass

    class Dying(loop.TrainingState):
        def save(self, *arguments, **others):
            super().save(*arguments, **others)
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "TrainingState", Dying)
        with pytest.raises(Killed):
            run("--resume", folder, "--updates", "4")
    (folder / "table.txt").unlink()
    assert run("--resume", folder) == 0
    assert len(contents(folder)[0]) == 4
    drift = json.loads((folder / "drift.json").read_text())
    assert drift["kl"] / 8 == pytest.approx(contents(folder)[0][3]["kl"])
    assert (folder / "table.txt").exists()


def test_a_prompt_longer_than_the_context_is_refused(tmp_path, model_folder):
    (tmp_path / "prompts.txt").write_text("xyz " * 40)
    arguments = ["--model", model_folder, "--prompts", tmp_path / "prompts.txt"]
    with pytest.raises(ValueError, match="has room for 26"):
        run(*MICRO, *arguments, "--out", tmp_path / "run")


@pytest.mark.parametrize("field", dataclasses.fields(PPOConfig), ids=lambda field: field.name)
def test_every_constant_is_an_option_with_a_reason(field):
    option = "--" + field.name.replace("_", "-")
    if isinstance(field.default, bool):
        assert vars(parse(option))[field.name] is True
        assert vars(parse("--no" + option[1:]))[field.name] is False
    else:
        assert vars(parse(option, str(field.default)))[field.name] == field.default
    assert field.metadata["reason"]
    assert field.name not in vars(parse()), "an option that is not given must stay out"


def test_defaults_are_the_configuration_s_own():
    assert json.loads(PPOConfig().to_json()) == {
        field.name: field.default for field in dataclasses.fields(PPOConfig)
    }
