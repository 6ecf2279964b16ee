"""Writers that die at any moment: at most the record being written is lost, and it is said."""

import json
import random
import subprocess
import sys
import time

import pytest

from kl_kernels import files
from kl_kernels.monitor import audit
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.verify import verify_log

# Says what append has returned for, so that the test knows what may not be lost.
WRITER = """
import itertools, sys
from kl_kernels.monitor.audit import AuditLog
with AuditLog(sys.argv[1]) as log:
    for i in itertools.count():
        log.log(i, {"kl": i / 7})
        print(i, flush=True)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_bytes().splitlines()]


def test_a_killed_writer_loses_nothing_that_was_appended(path):
    moments = random.Random(0)
    for _ in range(4):
        at_start = len(path.read_bytes().splitlines()) if path.exists() else 0
        command = [sys.executable, "-c", WRITER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            writer.stdout.readline()
            time.sleep(moments.uniform(0, 0.3))
            writer.kill()  # SIGKILL: nothing in the process runs any more
            last = int(([0, *writer.stdout.read().split()])[-1])
        verdict = verify_log(path)
        assert verdict.problem in (None, "torn tail"), verdict
        # The header or the "resumed" record, then the metrics up to the last one, at least.
        assert verdict.records >= at_start + 1 + last + 1
    with AuditLog(path) as log:
        log.append("note", {})
    assert verify_log(path).ok
    assert kinds(path).count("resumed") == 4


class Crash(Exception):
    pass


def crash(*_, **__):
    raise Crash


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_crash_between_the_record_and_its_sidecar_is_no_tampering(path, monkeypatch, step):
    with AuditLog(path) as log:
        log.append("note", {})
        target = (audit.Head, "write") if step == "write" else (files.os, step)
        if step == "fsync":  # the record's passes, the sidecar's does not
            fsync, n_calls = files.os.fsync, []
            monkeypatch.setattr(
                *target, lambda fd: (n_calls.append(fd), len(n_calls) > 1 and crash(), fsync(fd))
            )
        else:
            monkeypatch.setattr(*target, crash)
        with pytest.raises(Crash):
            log.append("note", {})
        monkeypatch.undo()
    verdict = verify_log(path)
    assert verdict.ok
    assert verdict.records == 3
    assert "stopped before the sidecar counted the last one" in verdict.message
    with AuditLog(path) as log:
        log.append("note", {})
    verdict = verify_log(path)
    assert verdict.ok
    assert "stopped" not in verdict.message
    assert kinds(path) == ["header", "note", "note", "resumed", "note"]


def test_crashes_in_a_row_leave_the_sidecar_no_further_behind(path, monkeypatch):
    write, n_calls = audit.Head.write, []
    with AuditLog(path) as log:
        monkeypatch.setattr(audit.Head, "write", crash)
        with pytest.raises(Crash):
            log.append("note", {})
    for _ in range(3):  # the sidecar is mended; then the "resumed" record is in, its sidecar not
        n_calls.clear()
        monkeypatch.setattr(
            audit.Head,
            "write",
            lambda head, log: (n_calls.append(log), len(n_calls) > 1 and crash(), write(head, log)),
        )
        with pytest.raises(Crash):
            AuditLog(path)
        monkeypatch.undo()
        assert verify_log(path).ok
    assert kinds(path) == ["header", "note", *["resumed"] * 3]


def test_a_torn_line_is_dropped_and_the_log_says_how_much_of_it(path):
    """At every length a record can be torn at."""
    with AuditLog(path) as log:
        log.append("note", {})
    sidecar = path.with_name("audit.jsonl.head")
    anchored = sidecar.read_text()
    with AuditLog(path):
        pass
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for length in (1, 2, 50, len(whole) - start - 1):
        path.write_bytes(whole[: start + length])
        sidecar.write_text(anchored)
        verdict = verify_log(path)
        assert (verdict.problem, verdict.line, verdict.records) == ("torn tail", 3, 2)
        AuditLog(path).close()
        assert verify_log(path).ok
        assert kinds(path) == ["header", "note", "resumed"]
        last = json.loads(path.read_bytes().splitlines()[-1])
        assert last["data"]["torn_bytes"] == length


def test_a_line_that_reached_the_disk_in_pieces_is_torn_even_if_it_has_its_end(path):
    """After a power cut, a page of a line may be zeros while the next one is there."""
    with AuditLog(path) as log:
        log.append("note", {})
    with open(path, "ab") as file:
        file.write(b'{"data":{' + bytes(100) + b'"}\n')
    assert (verify_log(path).problem, verify_log(path).line) == ("torn tail", 3)
    AuditLog(path).close()
    assert verify_log(path).ok


def test_but_a_torn_line_that_the_sidecar_counts_was_cut(path):
    with AuditLog(path) as log:
        log.append("note", {})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"\(truncated\): line 2 is cut short, but 2 records"):
        AuditLog(path)


def test_a_sidecar_cannot_be_one_behind_a_torn_line(path):
    """The writer mends the sidecar before it goes on."""
    with AuditLog(path) as log:
        anchored = path.with_name("audit.jsonl.head").read_text()
        log.append("note", {})
    with open(path, "ab") as file:
        file.write(b"{")
    path.with_name("audit.jsonl.head").write_text(anchored)
    assert verify_log(path).problem == "sidecar disagrees"


@pytest.mark.parametrize("step", ["nothing", "sidecar", "file", "header"])
def test_a_crash_while_a_log_is_begun_leaves_one_that_can_be_opened(path, monkeypatch, step):
    """`step` is the last thing that still happened."""
    target = {
        "nothing": (audit.Head, "write"),
        "sidecar": (audit, "FileIO"),
        "file": (audit, "sync_folder"),
        "header": (audit.os, "fsync"),
    }[step]
    if step == "header":
        # Head.write flushes file and folder, then _create the folder; the fourth is the record's.
        fsync, n_calls = files.os.fsync, []
        monkeypatch.setattr(
            *target, lambda fd: (n_calls.append(fd), len(n_calls) == 4 and crash(), fsync(fd))
        )
    else:
        monkeypatch.setattr(*target, crash)
    with pytest.raises(Crash):
        AuditLog(path)
    monkeypatch.undo()
    if path.exists():
        assert verify_log(path).ok
    AuditLog(path).close()
    assert verify_log(path).ok
    assert kinds(path) == (["header", "resumed"] if step == "header" else ["header"])


def test_a_torn_header_is_written_again_and_said(path):
    AuditLog(path).close()
    path.write_bytes(path.read_bytes()[:20])
    path.with_name("audit.jsonl.head").write_text(json.dumps({"count": 0, "hash": "0" * 64}))
    assert verify_log(path).problem == "torn tail"
    AuditLog(path).close()
    assert verify_log(path).ok
    assert kinds(path) == ["header", "resumed"]
