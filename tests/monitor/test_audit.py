"""The audit log: what it holds, how a line is made, who may write it."""

import hashlib
import json
import math
import os
import stat
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch

from kl_kernels import __version__, files
from kl_kernels.monitor import audit
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.events import Event
from kl_kernels.monitor.verify import verify_log


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def records(path):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_bytes().splitlines()]


def test_the_first_record_holds_header_and_versions_and_records_follow_in_order(path):
    with AuditLog(path, header={"config": {"seed": 0}}) as log:
        log.append("note", {"text": "first"})
        log.append("note", {"text": "second"})
    header, *notes = records(path)
    assert header["kind"] == "header"
    assert header["data"]["header"] == {"config": {"seed": 0}}
    assert header["data"]["versions"]["kl_kernels"] == __version__
    assert header["data"]["versions"]["torch"]
    assert [note["data"]["text"] for note in notes] == ["first", "second"]
    assert [record["index"] for record in (header, *notes)] == [0, 1, 2]


def test_each_hash_is_that_of_the_canonical_json_without_it_and_names_the_one_before(path):
    with AuditLog(path) as log:
        for i in range(5):
            log.append("note", {"b": i, "a": "ä"})
    previous = "0" * 64
    for line, record in zip(path.read_text().splitlines(), records(path)):
        claimed = record.pop("hash")
        canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
        assert claimed == hashlib.sha256(canonical.encode()).hexdigest()
        assert line == canonical[:-1] + f',"hash":"{claimed}"' + "}"
        assert record["previous"] == previous
        previous = claimed
    assert log.head == previous
    sidecar = json.loads((path.parent / "audit.jsonl.head").read_text())
    assert sidecar == {"count": 6, "hash": previous}


def test_it_is_a_sink_for_metrics_and_events(path):
    event = Event(4, "kl_jump", 9.0, 3.0, "KL is 9 nats")
    with AuditLog(path) as log:
        log.log(4, {"kl": 9.0})
        log.alert(event)
    _, metrics, alert = records(path)
    assert (metrics["kind"], metrics["data"]) == ("metrics", {"step": 4, "metrics": {"kl": 9.0}})
    assert (alert["kind"], alert["data"]) == ("event", asdict(event))


def test_nan_and_infinities_are_strings_that_float_reads_back(path):
    values = [math.nan, math.inf, -math.inf, -0.0, 1e-320, 0.1]
    with AuditLog(path) as log:
        log.append("note", {"values": tuple(values), "nested": [{"x": math.nan}]})
    data = records(path)[1]["data"]
    assert data["values"][:3] == ["NaN", "Infinity", "-Infinity"]
    assert list(map(repr, map(float, data["values"]))) == list(map(repr, values))
    assert data["nested"] == [{"x": "NaN"}]


def test_numbers_of_numpys_and_of_tensors_are_logged_as_numbers(path):
    loss = torch.tensor(0.5, requires_grad=True) * 2
    values = [np.float32(0.5), np.int64(3), np.array(0.25), torch.tensor(7), np.True_, loss]
    with AuditLog(path) as log:
        log.append("note", {"values": values, "nan": np.float32("nan")})
    data = records(path)[1]["data"]
    assert data == {"values": [0.5, 3, 0.25, 7, True, 1.0], "nan": "NaN"}
    assert verify_log(path).ok


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"a": [0, {"b": object()}]}, r"data\['a'\]\[1\]\['b'\] is a object; accepted: None, bool"),
        ({"a": {1: 2}}, r"data\['a'\] has the key 1; keys must be str"),
        ({"a": b"bytes"}, r"data\['a'\] is a bytes"),
        ({"a": np.ones(2)}, r"data\['a'\] is a ndarray"),
        ({"a": torch.ones(2)}, r"data\['a'\] is a Tensor"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_name_and_leaves_no_trace(path, data, message):
    with AuditLog(path) as log:
        with pytest.raises(TypeError, match=message):
            log.append("note", data)
        log.append("note", {})
    assert verify_log(path).records == 2


def test_a_bad_header_leaves_no_file(path):
    with pytest.raises(TypeError, match=r"data\['header'\]\['config'\] is a object"):
        AuditLog(path, header={"config": object()})
    assert not path.exists()
    AuditLog(path).close()


@pytest.mark.parametrize("kind", ["header", "resumed", "", None])
def test_kinds_of_the_log_itself_are_refused(path, kind):
    with AuditLog(path) as log, pytest.raises(ValueError, match="kind is"):
        log.append(kind, {})


def test_a_record_longer_than_a_reader_accepts_is_refused(path):
    with AuditLog(path) as log:
        with pytest.raises(ValueError, match="accepted: up to 16777216"):
            log.append("note", {"x": "x" * 2**24})
        log.append("note", {"x": "x" * (2**24 - 400)})
    assert verify_log(path).ok


def test_opening_continues_and_says_so(path):
    with AuditLog(path, header={"run": 1}) as log:
        log.append("note", {})
    with AuditLog(path, header={"run": 2}) as log:
        log.append("note", {})
    kinds = [record["kind"] for record in records(path)]
    assert kinds == ["header", "note", "resumed", "note"]
    resumed = records(path)[2]["data"]
    assert resumed["torn_bytes"] == 0
    assert resumed["header"] == {"run": 2}
    assert verify_log(path).ok


def test_a_broken_log_is_not_continued_and_stays_as_it_is(path):
    with AuditLog(path) as log:
        log.append("note", {"x": 1})
        log.append("note", {"x": 2})
    broken = path.read_bytes().replace(b'"x":1', b'"x":7')
    path.write_bytes(broken)
    with pytest.raises(ValueError, match=r"cannot be continued \(edited\): line 2 is not what was"):
        AuditLog(path)
    assert path.read_bytes() == broken


def test_a_log_that_was_deleted_is_not_begun_anew(path):
    AuditLog(path).close()
    path.unlink()
    with pytest.raises(ValueError, match="is missing, but its sidecar counts 1 records"):
        AuditLog(path)


def test_a_file_that_is_no_log_is_not_continued(path):
    path.write_text("precious\n")
    with pytest.raises(ValueError, match=r"\(not a log\)"):
        AuditLog(path)
    assert path.read_text() == "precious\n"


def test_a_closed_log_takes_no_record_and_closes_again(path):
    log = AuditLog(path)
    log.close()
    log.close()
    with pytest.raises(ValueError, match="is closed; open it again"):
        log.append("note", {})


def test_a_second_writer_is_refused_here_and_in_another_process(path):
    open_it = (
        "import sys; from kl_kernels.monitor.audit import AuditLog\n"
        "try: AuditLog(sys.argv[1]).close()\n"
        "except ValueError as error: sys.exit(str(error))"
    )
    command = [sys.executable, "-c", open_it, str(path)]
    with AuditLog(path):
        with pytest.raises(ValueError, match="is open for writing, here or in another process"):
            AuditLog(path)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert "a log has one writer" in done.stderr
    subprocess.run(command, check=True)
    assert verify_log(path).ok


def test_files_are_for_their_owner_to_write_and_a_lock_is_for_its_owner_alone(path):
    """A reader who may open the lock could hold it."""
    before = os.umask(0o022)
    try:
        AuditLog(path).close()
    finally:
        os.umask(before)
    for file in path.parent.iterdir():
        mode = 0o600 if file.suffix == ".lock" else 0o644
        assert stat.S_IMODE(file.stat().st_mode) == mode, file


def test_a_record_is_on_the_disk_before_the_sidecar_counts_it_and_before_returning(
    path, monkeypatch
):
    order = []
    fsync, replace = os.fsync, os.replace
    with AuditLog(path) as log:
        log_inode = path.stat().st_ino

        def note_fsync(fd):
            order.append("log" if os.fstat(fd).st_ino == log_inode else "other")
            fsync(fd)

        monkeypatch.setattr(files.os, "fsync", note_fsync)
        monkeypatch.setattr(files.os, "replace", lambda a, b: (order.append("head"), replace(a, b)))
        log.append("note", {})
        monkeypatch.undo()
    assert order == ["log", "other", "head", "other"][: 3 + (os.name != "nt")]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["record", "sidecar"])
def test_after_a_failed_write_the_log_is_closed_and_can_be_continued(
    path, monkeypatch, error, where
):
    def fail(*_):
        raise error

    log = AuditLog(path)
    target = (audit.os, "fsync") if where == "record" else (audit.Head, "write")
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(type(error)):
            log.append("note", {"x": 1})
    with pytest.raises(ValueError, match="is closed"):
        log.append("note", {"x": 2})
    with AuditLog(path) as log:
        log.append("note", {"x": 3})
    assert verify_log(path).ok
    # The record that failed reached the file whole, so it stays.
    assert [r["data"].get("x") for r in records(path)] == [None, 1, None, 3]
