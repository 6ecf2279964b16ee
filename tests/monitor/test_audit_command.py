"""`python -m kl_kernels audit`: what it prints and how it exits."""

import json
import subprocess
import sys

import pytest

from kl_kernels.cli import main
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.events import Event


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path, header={"seed": 5}) as log:
        log.log(12, {"kl_token_mean": 0.123456})
        log.alert(Event(12, "kl_jump", 9.0, 3.0, "KL is 9 nats"))
        log.append("no\x1b[31mte", {"te\x1bxt": "\x1b[31m", "long": "x" * 1000})
    return path


def test_a_whole_log_is_one_line_with_its_head_and_exit_code_0(path, capsys):
    assert main(["audit", "verify", str(path)]) == 0
    shown = capsys.readouterr().out
    head = json.loads(path.read_bytes().splitlines()[-1])["hash"]
    assert shown == f"{path}: 4 records, each as it was written; head {head}\n"
    assert main(["audit", "verify", str(path), "--head", head]) == 0
    assert "line 4 has the given hash" in capsys.readouterr().out


def test_a_bad_log_is_its_first_bad_line_and_exit_code_1(path, capsys):
    path.write_bytes(path.read_bytes().replace(b"0.123456", b"0.023456"))
    assert main(["audit", "verify", str(path)]) == 1
    assert capsys.readouterr().out.startswith(f"{path}: edited: line 2 is not what was hashed")
    assert main(["audit", "verify", str(path), "--json"]) == 1
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["ok"], verdict["problem"], verdict["line"]) == (False, "edited", 2)


def test_another_head_is_exit_code_1_and_no_head_at_all_2(path, capsys):
    assert main(["audit", "verify", str(path), "--head", "a" * 64]) == 1
    assert "hash not found" in capsys.readouterr().out
    assert main(["audit", "verify", str(path), "--head", "abc"]) == 2
    assert main(["audit", "verify", str(path) + "x"]) == 2


def test_show_is_a_line_per_record(path, capsys):
    assert main(["audit", "show", str(path)]) == 0
    header, metrics, event, note = capsys.readouterr().out.splitlines()
    assert header.split()[0] == "1"
    assert "seed=5" in header
    assert metrics.split()[2:] == ["metrics", "12", "kl_token_mean=0.1235"]
    assert event.split()[2:4] == ["event", "12"]
    assert 'message="KL is 9 nats"' in event
    assert note.endswith("...")
    assert len(note) < 160


def test_show_sends_no_control_characters_to_the_terminal(path, capsys):
    main(["audit", "show", str(path)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\u001b" in shown


def test_show_can_be_of_one_kind_and_marks_what_is_no_record(path, capsys):
    with open(path, "ab") as file:
        file.write(b"junk\n")
    assert main(["audit", "show", str(path), "--kind", "event"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert main(["audit", "show", str(path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "     5  not a record"


def test_show_into_a_pipe_that_closes_early_says_nothing(path):
    with open(path, "ab") as file:
        file.write(b"junk\n" * 50000)  # more than a pipe holds
    command = [sys.executable, "-m", "kl_kernels", "audit", "show", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as show:
        assert show.stdout.readline().split()[0] == b"1"
        show.stdout.close()
        assert show.stderr.read() == b""
    assert show.returncode == 0
