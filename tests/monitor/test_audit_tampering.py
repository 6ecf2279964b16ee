"""Every change of a log is found, at the right line."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kl_kernels.monitor import verify
from kl_kernels.monitor.audit import AuditLog
from kl_kernels.monitor.verify import PROBLEMS, verify_log

N = 8  # records


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    """A log of N lines: its path, which tests may spoil, and its lines."""
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    with AuditLog(path, header={"seed": 0}) as log:
        for i in range(N - 1):
            log.log(i, {"kl": i / 3, "entropy": float("nan")})
    return path, path.read_bytes().splitlines(keepends=True)


def check(path, lines):
    path.write_bytes(b"".join(lines))
    verdict = verify_log(path)
    assert verdict.problem is None or verdict.problem in PROBLEMS
    return verdict


def rehashed(line, **changes):
    """A line with other content and the hash that belongs to it."""
    record = json.loads(line)
    record.pop("hash")
    record.update(changes)
    body = json.dumps(record, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return (body[:-1] + f',"hash":"{digest}"' + "}\n").encode(), digest


def test_untouched_it_is_whole(log):
    path, lines = log
    verdict = check(path, lines)
    assert verdict.ok
    assert (verdict.records, verdict.line) == (N, None)
    assert verdict.head == json.loads(lines[-1])["hash"]


@given(st.data())
def test_any_flipped_bit_is_found_at_its_line(log, data):
    path, lines = log
    at = data.draw(st.integers(0, N - 1))
    byte = data.draw(st.integers(0, len(lines[at]) - 1))
    changed = bytearray(lines[at])
    changed[byte] ^= 1 << data.draw(st.integers(0, 7))
    verdict = check(path, [*lines[:at], bytes(changed), *lines[at + 1 :]])
    assert (verdict.line, verdict.records) == (at + 1, at)
    ends_early = at == N - 1 and byte == len(lines[at]) - 1  # no line end: as if it were cut
    assert verdict.problem == ("truncated" if ends_early else "edited")


@given(at=st.integers(0, N - 1))
def test_a_removed_line_is_found(log, at):
    path, lines = log
    verdict = check(path, lines[:at] + lines[at + 1 :])
    assert verdict.line == at + 1
    assert verdict.problem == ("truncated" if at == N - 1 else "removed")


@given(at=st.integers(0, N - 1), to=st.integers(0, N))
def test_a_repeated_line_is_found(log, at, to):
    path, lines = log
    verdict = check(path, [*lines[:to], lines[at], *lines[to:]])
    # A copy in front of its original is taken for it, and the original for the copy.
    if at == to:
        assert (verdict.line, verdict.problem) == (at + 2, "inserted")
    elif at > to:
        assert (verdict.line, verdict.problem) == (to + 1, "reordered")
    else:
        assert (verdict.line, verdict.problem) == (to + 1, "inserted")


@given(st.permutations(range(N)))
def test_another_order_is_found_at_the_first_line_out_of_place(log, order):
    path, lines = log
    verdict = check(path, [lines[i] for i in order])
    wrong = [i for i in range(N) if order[i] != i]
    if not wrong:
        assert verdict.ok
    else:
        assert (verdict.line, verdict.problem) == (wrong[0] + 1, "reordered")


@given(at=st.integers(0, N - 1), junk=st.binary(max_size=200))
def test_inserted_lines_are_found(log, at, junk):
    path, lines = log
    verdict = check(path, [*lines[:at], junk.replace(b"\n", b"") + b"\n", *lines[at:]])
    assert (verdict.line, verdict.problem) == (at + 1, "inserted")


@given(junk=st.binary(min_size=1, max_size=200))
def test_bytes_behind_the_end_are_found(log, junk):
    """One line of them looks like a record the writer did not finish, and would be dropped."""
    path, lines = log
    verdict = check(path, [*lines, junk])
    assert verdict.line == N + 1
    if b"\n" not in junk[:-1]:
        assert verdict.problem == "torn tail"
    else:
        assert verdict.problem == "edited"


@given(st.data())
def test_a_log_cut_at_any_byte_is_truncated(log, data):
    path, lines = log
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole) - 1))
    verdict = check(path, [whole[:cut]])
    n_left = whole[:cut].count(b"\n")
    assert (verdict.line, verdict.problem, verdict.records) == (n_left + 1, "truncated", n_left)


@given(at=st.integers(0, N - 1))
def test_equal_json_in_other_bytes_is_an_edit(log, at):
    path, lines = log
    spaced = json.dumps(json.loads(lines[at])).encode() + b"\n"
    verdict = check(path, [*lines[:at], spaced, *lines[at + 1 :]])
    assert (verdict.line, verdict.problem) == (at + 1, "edited")


@given(at=st.integers(0, N - 1))
def test_other_line_ends_are_an_edit(log, at):
    path, lines = log
    verdict = check(path, [*lines[:at], lines[at][:-1] + b"\r\n", *lines[at + 1 :]])
    assert (verdict.line, verdict.problem) == (at + 1, "edited")


@given(at=st.integers(1, N - 1))
def test_an_edit_with_a_fresh_hash_is_found_where_the_old_hash_is_named(log, at):
    path, lines = log
    forged, _ = rehashed(lines[at], data={"step": 0, "metrics": {"kl": 0.0}})
    verdict = check(path, [*lines[:at], forged, *lines[at + 1 :]])
    if at == N - 1:
        assert (verdict.line, verdict.problem) == (N, "sidecar disagrees")
    else:
        assert (verdict.line, verdict.problem) == (at + 2, "edited")


@pytest.mark.parametrize(("index", "problem"), [(N, "removed"), (N - 2, "inserted")])
def test_a_last_line_with_another_index_and_a_fresh_hash_is_found(log, index, problem):
    path, lines = log
    forged, _ = rehashed(lines[-1], index=index)
    verdict = check(path, [*lines[:-1], forged])
    assert (verdict.line, verdict.problem) == (N, problem)


@given(at=st.integers(1, N - 1))
def test_a_chain_that_was_forged_to_its_end_contradicts_the_sidecar_and_a_hash_kept_elsewhere(
    log, at
):
    path, lines = log
    forged, digest = rehashed(lines[at], kind="forged")
    chain = [*lines[:at], forged]
    for line in lines[at + 1 :]:
        line, digest = rehashed(line, previous=digest)
        chain.append(line)
    verdict = check(path, chain)
    assert (verdict.line, verdict.problem) == (N, "sidecar disagrees")

    kept = json.loads(lines[-1])["hash"]
    head_path = path.with_name("audit.jsonl.head")
    honest = head_path.read_text()
    head_path.write_text(json.dumps({"count": N, "hash": digest}))
    try:
        assert verify_log(path).ok  # the chain and the sidecar prove nothing against this
        assert verify_log(path, head=kept).problem == "hash not found"
        before = verify_log(path, head=json.loads(lines[at - 1])["hash"])
        assert before.ok
        assert f"line {at} has the given hash" in before.message
    finally:
        head_path.write_text(honest)


def sidecar_of(path, text):
    """Another sidecar, for one test: the module's log stays as it is."""
    copy = path.with_name("copy.jsonl")
    copy.write_bytes(path.read_bytes())
    if text is not None:
        copy.with_name("copy.jsonl.head").write_text(text)
    else:
        copy.with_name("copy.jsonl.head").unlink(missing_ok=True)
    return verify_log(copy)


@pytest.mark.parametrize("behind", range(N + 1))
def test_a_sidecar_may_be_one_record_behind_but_not_more(log, behind):
    path, lines = log
    path.write_bytes(b"".join(lines))
    hashes = ["0" * 64, *(json.loads(line)["hash"] for line in lines)]
    count = N - behind
    text = json.dumps({"count": count, "hash": hashes[count]})
    verdict = sidecar_of(path, text)
    assert verdict.problem == (None if behind < 2 else "sidecar disagrees")
    assert ("stopped before the sidecar counted" in verdict.message) == (behind == 1)
    if behind > 1:
        assert verdict.line == count + 1


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", "null", '{"count": 8}', '{"count": -1, "hash": "%s"}', "[" * 10**5,
     '{"count": 8.0, "hash": "%s"}', '{"count": 8, "hash": "x"}', '{"count": 8, "hash": 1}'],
)  # fmt: skip
def test_a_sidecar_that_is_none_is_said_to_disagree(log, text):
    path, lines = log
    path.write_bytes(b"".join(lines))
    text = text.replace("%s", json.loads(lines[-1])["hash"])
    assert sidecar_of(path, text).problem == "sidecar disagrees"


def test_a_lost_sidecar_is_said_to_be_missing(log):
    path, lines = log
    path.write_bytes(b"".join(lines))
    verdict = sidecar_of(path, None)
    assert (verdict.problem, verdict.records) == ("sidecar missing", N)


def test_an_edit_is_told_even_where_the_sidecar_is_lost(log):
    path, lines = log
    path.write_bytes(b"".join([*lines[:3], b"x" + lines[3][1:], *lines[4:]]))
    verdict = sidecar_of(path, None)
    assert (verdict.problem, verdict.line) == ("edited", 4)


@pytest.mark.parametrize(
    "content", [b"precious\n\n", b"\x80\x04K\x01.\nx", b'{"a": 1}\n{"a": 2}\n', b"\n\n"]
)
def test_other_files_are_not_logs(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    verdict = verify_log(path)
    assert (verdict.problem, verdict.line) == ("not a log", 1)


def test_a_log_of_a_later_format_is_not_judged_by_this_one(log, tmp_path):
    _, lines = log
    header, _ = rehashed(lines[0], data={"format": 2})
    path = tmp_path / "audit.jsonl"
    path.write_bytes(header + lines[1])
    assert verify_log(path).problem == "not a log"


def test_nested_json_with_a_right_hash_is_not_a_record(log):
    path, lines = log
    body = b'{"data":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    digest = hashlib.sha256(body).hexdigest().encode()
    deep = body[:-1] + b',"hash":"' + digest + b'"}\n'
    assert check(path, [*lines[:2], deep, *lines[2:]]).problem == "inserted"


def test_a_line_longer_than_any_record_is_never_in_memory_whole(log, monkeypatch):
    path, lines = log
    monkeypatch.setattr(verify, "MAX_LINE_BYTES", 1000)
    path.write_bytes(b"".join(lines[:2]) + b"x" * 10**6)
    with open(path, "rb") as file:
        assert max(map(len, verify.lines_of(file))) == 1001
    assert (verify_log(path).line, verify_log(path).problem) == (3, "edited")


@pytest.mark.parametrize("head", ["", "12ab", "G" * 64, "A" * 64])
def test_a_head_that_is_no_hash_is_refused(log, head):
    with pytest.raises(ValueError, match="it must be 64 hexadecimal digits"):
        verify_log(log[0], head=head)


def test_a_log_being_written_is_checked_up_to_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as log:
        read = verify._read_sidecar

        def read_then_write(path):
            head = read(path)
            if head.count < 4:
                for _ in range(3):
                    log.append("note", {})
            return head

        monkeypatch.setattr(verify, "_read_sidecar", read_then_write)
        verdict = verify_log(path)
    assert verdict.ok
    assert "it is being written" in verdict.message
