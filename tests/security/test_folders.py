"""Only the user can write to a run's files, and a link planted among them is not followed."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kl_kernels.files import check_links, make_folder, write_text
from kl_kernels.lab.ppo.checkpoint import RunFolder, create_run, open_run, save_model, save_state
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.pretrain import train_tokenizer
from kl_kernels.lab.ppo.report import MetricsLog
from kl_kernels.lab.ppo.run_logger import make_sink
from kl_kernels.lab.study import runs
from kl_kernels.lab.study.plan import Plan, create_study, open_study
from kl_kernels.lab.study.runs import jobs_of
from kl_kernels.monitor.audit import AuditLog


@pytest.fixture(params=[0o000, 0o002, 0o022, 0o027, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {str(p): stat.S_IMODE(p.lstat().st_mode) for p in [folder, *folder.rglob("*")]}


LOCKS = ("lock", "audit.jsonl.lock")


def assert_by_the_umask(folder: Path, umask: int) -> None:
    """Written by its user alone, read by whom the umask lets, except for what is private."""
    found = modes(folder)
    assert len(found) > 1
    for path, mode in found.items():
        most = 0o755 if os.path.isdir(path) else 0o644
        expected = most & (0o700 if os.path.basename(path) in LOCKS else ~umask)
        assert mode == expected, (path, oct(mode), oct(expected))


def test_a_run_folder_is_written_by_its_user_alone_and_read_as_the_umask_has_it(tmp_path, umask):
    run = create_run(tmp_path / "runs" / "new", PPOConfig())
    save_state(run.checkpoint, {"weights": torch.ones(2)})
    MetricsLog(run.metrics, keep=0).append({"update": 1})
    AuditLog(run.audit).close()
    AuditLog(run.audit).close()  # "resumed"
    tokenizer = train_tokenizer(["a b c"], 300)
    tokenizer.chat_template = {"default": "x", "tool_use": "y"}  # saved in a folder of their own
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1, n_positions=8))
    save_model(run.policy, lm, tokenizer)
    assert {
        "audit.jsonl",
        "audit.jsonl.head",
        "audit.jsonl.lock",
        "metrics.jsonl",
        "checkpoint.pt",
        "config.json",
        "policy",
    } == {path.name for path in run.path.iterdir()}
    assert list(run.policy.glob("*/tool_use*"))
    assert_by_the_umask(tmp_path / "runs", umask)


def test_a_study_folder_is_too(tmp_path, umask):
    plan = Plan(PPOConfig(), betas=("0",), n_seeds=1)
    study = create_study(tmp_path / "runs" / "study", plan)
    start, _ = jobs_of(plan, study)
    start.set_up()
    with runs._locked(study):
        pass
    assert study.lock.exists()
    assert_by_the_umask(tmp_path / "runs", umask)


def test_a_dashboard_s_folder_is_private_whatever_its_library_writes(tmp_path, umask):
    run = create_run(tmp_path / "run", PPOConfig(log_to="tensorboard"))
    sink = make_sink(PPOConfig(log_to="tensorboard"), run)
    sink.log(0, {"kl": 1.0})
    sink.close()
    assert list((run.path / "tensorboard").iterdir())
    assert modes(run.path)[str(run.path / "tensorboard")] == 0o700


def test_a_folder_that_is_there_keeps_its_mode(tmp_path):
    tmp_path.chmod(0o755)
    make_folder(tmp_path)
    assert modes(tmp_path)[str(tmp_path)] == 0o755


@pytest.fixture
def victim(tmp_path):
    """A file outside the run folder, which must stay as it is."""
    path = tmp_path / "victim"
    path.write_text("untouched")
    yield path
    assert path.read_text() == "untouched"


def test_a_link_at_the_temporary_name_is_not_written_through(tmp_path, victim):
    (tmp_path / "file.partial").symlink_to(victim)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_a_link_planted_after_the_last_look_is_refused(tmp_path, victim, monkeypatch):
    (tmp_path / "file.partial").symlink_to(victim)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    with pytest.raises(FileExistsError):
        write_text(tmp_path / "file", "new")


def test_temporary_files_lie_beside_their_place(tmp_path, monkeypatch):
    opened = []
    real_open = os.open

    def recording_open(*args):
        opened.append(args)
        return real_open(*args)

    monkeypatch.setattr(os, "open", recording_open)
    write_text(tmp_path / "file", "new")
    path, flags, mode = opened[0]
    assert Path(path).parent == tmp_path
    assert flags & os.O_EXCL
    assert flags & os.O_NOFOLLOW
    assert mode == 0o644


def test_a_model_is_not_saved_through_a_link(tmp_path, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (tmp_path / "policy.partial").symlink_to(elsewhere)
    with pytest.raises(FileExistsError):
        save_model(tmp_path / "policy", None, None)
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["log", "log.lock"])
def test_an_audit_log_is_not_written_through_a_link(tmp_path, victim, name):
    with AuditLog(tmp_path / "log") as log:
        log.append("a", {})
    path = tmp_path / name
    moved = path.rename(tmp_path / "moved")
    before = moved.read_bytes()
    path.symlink_to(moved)
    with pytest.raises(OSError, match=name):
        AuditLog(tmp_path / "log")
    assert moved.read_bytes() == before


@pytest.mark.parametrize(
    "name",
    ["audit.jsonl", "metrics.jsonl", "checkpoint.pt", "reference", "policy/model.safetensors"],
)
@pytest.mark.parametrize("target", ["{outside}/x", "../../x", "/"])
def test_a_run_with_a_link_out_of_it_is_not_continued(tmp_path, name, target):
    run = create_run(tmp_path / "run", PPOConfig())
    path = run.path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(target.format(outside=tmp_path / "outside"))
    with pytest.raises(ValueError, match=rf"^resume is '.*', in which '{name}' is a link"):
        open_run(run.path)


def test_a_study_with_a_link_out_of_it_is_not_continued(tmp_path):
    study = create_study(tmp_path / "study", Plan(PPOConfig()))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    study.run("0", 0).path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"^resume is '.*', in which 'runs/beta-0-seed-0' is a"):
        open_study(study.path)


def test_links_within_a_folder_are_its_own_business(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "latest").symlink_to("../in")  # as dashboards leave them
    (tmp_path / "loop").symlink_to("loop")
    check_links("resume", tmp_path)
    # A run folder that is reached through a link is one.
    create_run(tmp_path / "run", PPOConfig())
    (tmp_path / "link").symlink_to("run")
    assert open_run(tmp_path / "link")[1] == PPOConfig()


HOSTILE = ["../../x", "/etc/x", "a/b", "..", "a\0b"]


@pytest.mark.parametrize("value", [*HOSTILE, 1, None, ["0"]])
def test_the_betas_of_a_plan_cannot_name_other_places(tmp_path, value):
    study = create_study(tmp_path / "study", Plan(PPOConfig()))
    plan = json.loads(study.plan.read_text())
    study.plan.write_text(json.dumps(plan | {"betas": [value]}))
    with pytest.raises(ValueError, match=r"whose study.json is not usable: betas holds"):
        open_study(study.path)


@pytest.mark.parametrize("value", [*HOSTILE, 1.5, True, None])
def test_the_seed_of_a_plan_or_a_run_cannot_name_other_places(tmp_path, value):
    study = create_study(tmp_path / "study", Plan(PPOConfig()))
    plan = json.loads(study.plan.read_text())
    plan["constants"]["seed"] = value
    study.plan.write_text(json.dumps(plan))
    with pytest.raises(ValueError, match=r"whose study.json is not usable: seed is"):
        open_study(study.path)
    run = create_run(tmp_path / "run", PPOConfig())
    run.config.write_text(json.dumps(plan["constants"]))
    with pytest.raises(ValueError, match=r"whose config.json is not usable: seed is"):
        open_run(run.path)


@pytest.mark.parametrize("name", ["model", "prompts", "reward"])
@pytest.mark.parametrize("value", ["a\0b", 5, None, ["x"]])
def test_what_a_run_is_given_is_text_without_nul(tmp_path, name, value):
    run = create_run(tmp_path / "run", PPOConfig())
    run.config.write_text(json.dumps({name: value}))
    with pytest.raises(ValueError, match=rf"whose config.json is not usable: {name} is"):
        open_run(run.path)


@pytest.mark.parametrize("command", ["run", "study"])
def test_a_folder_s_name_is_text_without_nul(tmp_path, command):
    create = create_run if command == "run" else lambda p, c: create_study(p, Plan(c))
    with pytest.raises(ValueError, match=r"^out is '.*a.b', which cannot be written: .*NUL"):
        create(tmp_path / "a\0b", PPOConfig())


def test_every_file_of_a_run_lies_in_its_folder(tmp_path):
    names = [name for name, member in vars(RunFolder).items() if isinstance(member, property)]
    assert len(names) > 8
    assert all(getattr(RunFolder(tmp_path), name).parent == tmp_path for name in names)


@pytest.mark.parametrize("beta", ["0.10", "1e-05", "adaptive", "1e300", "0"])
def test_every_folder_of_a_study_lies_in_it(tmp_path, beta):
    plan = Plan(PPOConfig(seed=2**62), betas=(beta,), n_seeds=1)
    study = create_study(tmp_path / "study", plan)
    for job in jobs_of(plan, study):
        assert job.folder.path.parent.parent == study.path
        assert job.log.parent == study.path / "logs"
