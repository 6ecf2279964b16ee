"""The audit log beside forked children: one writer, one chain, and a lock that goes with it."""

import ctypes
import gc
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kl_kernels import AuditLog, KLMonitor
from kl_kernels.monitor.verify import verify_log

BELONGS = r"audit.jsonl' belongs to process {}, and this is process \d+, forked from it"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "audit.jsonl"


def kinds(path):
    return [json.loads(line)["kind"] for line in path.read_bytes().splitlines()]


def in_child(function):
    """Call `function` in a forked process, and return its result or error as text."""
    there, here = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            said = str(function())
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        os.write(here, said.encode())
        os._exit(0)
    os.close(here)
    with os.fdopen(there, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return said


@pytest.fixture
def sleeper():
    """Forks a child that lives until the test ends, and touches nothing."""
    children = []

    def fork():
        child = os.fork()
        if child == 0:
            signal.pause()
        children.append(child)
        return child

    yield fork
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_closed_log_can_be_opened_again_beside_a_child(path, sleeper):
    for _ in range(3):
        log = AuditLog(path)
        sleeper()
        log.append("note", {})
        log.close()
    assert kinds(path) == ["header", "note", *["resumed", "note"] * 2]
    assert verify_log(path).ok


def test_it_can_be_opened_again_beside_a_child_that_python_knows_nothing_of(path):
    """A C library may fork such a child: no hook closes its descriptors, and it shares the lock."""
    libc = ctypes.PyDLL(None)
    log = AuditLog(path)
    child = libc.fork()
    if child == 0:
        signal.pause()
    try:
        log.close()
        AuditLog(path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert verify_log(path).ok


def test_a_child_that_python_knows_nothing_of_does_not_unlock_its_parents_log(path):
    libc = ctypes.PyDLL(None)
    log = AuditLog(path)
    child = libc.fork()
    if child == 0:
        log.close()
        os._exit(0)
    os.waitpid(child, 0)
    with pytest.raises(ValueError, match="is open for writing"):
        AuditLog(path)
    log.close()


def test_a_child_holds_none_of_the_parents_descriptors(path):
    files = {os.path.realpath(f"{path}{end}") for end in ("", ".lock")}

    def held():
        fds = os.listdir("/proc/self/fd")
        return files & {os.path.realpath(f"/proc/self/fd/{fd}") for fd in fds}

    with AuditLog(path):
        assert held() == files
        assert in_child(held) == "set()"
        assert in_child(lambda: in_child(held)) == "set()"
        assert held() == files


def test_a_record_of_a_child_is_refused_and_the_chain_goes_on(path):
    with AuditLog(path) as log:
        refused = BELONGS.format(os.getpid())
        for write in (
            lambda: log.append("from a child", {}),
            lambda: log.log(1, {"kl": 0.1}),
            lambda: in_child(lambda: log.append("from a grandchild", {})),
        ):
            assert re.search(refused, in_child(write))
            log.append("note", {})
    assert kinds(path) == ["header", "note", "note", "note"]
    assert verify_log(path).ok


def test_closing_in_a_child_closes_nothing(path):
    with AuditLog(path) as log:
        for _ in range(2):
            assert in_child(log.close) == "None"
            assert "is open for writing" in in_child(lambda: AuditLog(path))
            log.append("note", {})
    assert verify_log(path).records == 3


def test_a_child_may_open_the_log_once_its_parent_has_closed_it(path):
    log = AuditLog(path)
    log.close()

    def write():
        with AuditLog(path) as own:
            own.append("from a child", {})

    assert in_child(write) == "None"
    assert "belongs to process" in in_child(lambda: log.append("note", {}))
    AuditLog(path).close()
    assert kinds(path) == ["header", "resumed", "from a child", "resumed"]
    assert verify_log(path).ok


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(path):
    script = (
        "import os, signal, sys\n"
        "from kl_kernels import AuditLog\n"
        "log = AuditLog(sys.argv[1])\n"
        "child = os.fork()\n"
        "if child == 0: signal.pause()\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        parent.wait()
        try:
            os.kill(child, 0)  # it lives
            AuditLog(path).close()
        finally:
            os.kill(child, signal.SIGKILL)
    assert verify_log(path).ok


def test_a_fork_in_the_middle_of_an_append_does_not_end_it(path):
    """A thread that appends while others fork: a child has a copy of a lock that is held."""
    n = 60
    with AuditLog(path) as log, ThreadPoolExecutor(1) as threads:
        done = threads.submit(lambda: [log.append("note", {"i": i}) for i in range(n)])
        while not done.done():
            assert "belongs to process" in in_child(lambda: log.append("from a child", {}))
        done.result()
    assert kinds(path) == ["header", *["note"] * n]
    assert verify_log(path).ok


def work(log):
    try:
        log.append("from a worker", {})
    except ValueError as error:
        return str(error)
    return "written"


def test_forked_workers_of_multiprocessing(path):
    log = AuditLog(path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def run():
        queue.put(work(log))

    workers = [context.Process(target=run) for _ in range(3)]
    for worker in workers:
        worker.start()
    said = [queue.get(timeout=60) for _ in workers]
    assert all("belongs to process" in text for text in said)
    log.append("note", {})
    for worker in workers:
        worker.join()
    log.close()
    AuditLog(path).close()
    assert kinds(path) == ["header", "note", "resumed"]


class Rows(torch.utils.data.Dataset):
    def __init__(self, log, monitor=None):
        self.log, self.monitor = log, monitor

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if self.monitor is not None:
            self.monitor.observe(i, kl=0.1)
            return i
        return work(self.log)


def loader(rows):
    return torch.utils.data.DataLoader(
        rows,
        num_workers=2,
        persistent_workers=True,
        multiprocessing_context="fork",
        collate_fn=list,
    )


def test_workers_of_a_data_loader(path):
    log = AuditLog(path)
    batches = loader(Rows(log))
    for _ in range(2):  # epochs, of the same workers
        for (said,) in batches:
            assert "belongs to process" in said
            log.append("note", {})
    log.close()
    AuditLog(path).close()  # the workers are still there
    del batches
    gc.collect()
    assert kinds(path) == ["header", *["note"] * 8, "resumed"]
    assert verify_log(path).ok


@pytest.mark.filterwarnings("ignore:AuditLog raised:RuntimeWarning")
def test_a_monitor_in_a_worker_goes_on_without_the_log(path):
    with AuditLog(path) as log:
        monitor = KLMonitor(sinks=[log])
        assert [i for (i,) in loader(Rows(log, monitor))] == [0, 1, 2, 3]
        monitor.observe(0, kl=0.1)
    assert kinds(path) == ["header", "metrics"]


def test_logs_that_are_gone_are_not_kept_for_the_sake_of_forks(path):
    from kl_kernels.monitor import audit

    gc.collect()
    before = len(audit._open)
    AuditLog(path).close()
    gc.collect()
    assert len(audit._open) == before
