"""Running a study: a process per run, as many at a time as there are cores, and one progress bar.

A run is `python -m kl_kernels ppo --resume` in a folder that holds its constants and a copy of its
seed's start. So starting, going on after a crash and going on after Ctrl-C are one case, and what a
run leaves is what it would have left on its own.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from kl_kernels.files import make_folder, opener, private_opener, write_bytes, write_text
from kl_kernels.lab.ppo.checkpoint import RunFolder
from kl_kernels.lab.ppo.progress import UpdateProgress
from kl_kernels.lab.study.plan import Plan, StudyFolder
from kl_kernels.lab.study.prepare import is_prepared
from kl_kernels.text import printable

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_STOP = 20.0
LINES_OF_LOG = 15
BYTES_OF_PROGRESS = 2000  # read from a log's end, where the progress bar is

# The bar as tqdm writes it. (Other bars in the log are transformers', of models that are loaded.)
PROGRESS = re.compile(r"(pretraining|preferences): +\d+%\|[^|\r\n]*\| (\d+/\d+)")


class ChildFailed(RuntimeError):
    """A child process ended with an error; the message has the end of its log."""


@dataclass(frozen=True)
class Job:
    """A child process that is to be run, in a folder, once what it needs is there."""

    folder: RunFolder
    log: Path
    command: tuple[str, ...]
    is_ready: Callable[[], bool]
    is_done: Callable[[], bool]
    set_up: Callable[[], None]  # called just before the process starts

    @property
    def name(self) -> str:
        return self.folder.path.name


def jobs_of(plan: Plan, study: StudyFolder) -> list[Job]:
    """List the starts, which runs wait for, then the runs, a seed at a time."""
    return [_start_job(plan, study, seed) for seed in plan.seeds] + [
        _run_job(plan, study, beta, seed) for seed in plan.seeds for beta in plan.betas
    ]


def _start_job(plan: Plan, study: StudyFolder, seed: int) -> Job:
    folder = study.start(seed)

    def set_up() -> None:
        make_folder(folder.path)
        config = plan.config(plan.betas[0], seed)  # beta plays no role here
        write_text(folder.config, config.to_json())

    return Job(
        folder,
        study.log(folder),
        ("kl_kernels.lab.study.prepare", str(folder.path)),
        is_ready=lambda: True,
        is_done=lambda: is_prepared(folder),
        set_up=set_up,
    )


def _run_job(plan: Plan, study: StudyFolder, beta: str, seed: int) -> Job:
    folder, start = study.run(beta, seed), study.start(seed)

    def set_up() -> None:
        make_folder(folder.path)
        _copy_start(start, folder)
        if not folder.config.is_file():
            write_text(folder.config, plan.config(beta, seed).to_json())

    return Job(
        folder,
        study.log(folder),
        ("kl_kernels", "ppo", "--resume", str(folder.path)),
        is_ready=lambda: is_prepared(start),
        is_done=folder.table.is_file,  # the last thing a run writes
        set_up=set_up,
    )


def _copy_start(start: RunFolder, run: RunFolder) -> None:
    if start.reference.is_dir() and not run.reference.is_dir():  # with --model there is none
        partial = run.reference.with_name(run.reference.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(start.reference, partial)
        os.replace(partial, run.reference)
    if not run.reward_model.is_file():
        write_bytes(run.reward_model, start.reward_model.read_bytes())


def run_all(plan: Plan, study: StudyFolder, n_at_a_time: int) -> None:
    """Run what the folder lacks of the plan.

    Raises:
        ValueError: another process is at work in the folder.
        ChildFailed: a run failed; the others were stopped, and nothing is lost.
        KeyboardInterrupt: all children were stopped, and nothing is lost.
    """
    waiting = [job for job in jobs_of(plan, study) if not job.is_done()]
    running: dict[Job, subprocess.Popen[bytes]] = {}
    with _locked(study) as lock, _terminate_as_interrupt(), _progress(plan, study) as show:
        try:
            while waiting or running:
                for job, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[job]
                    if not job.is_done():
                        raise ChildFailed(_failure(job, process))
                ready = [job for job in waiting if job.is_ready()]
                for job in ready[: n_at_a_time - len(running)]:
                    side_by_side = min(n_at_a_time, len(running) + len(ready))
                    running[job] = _launch(job, side_by_side, lock)
                    ready.remove(job)
                    waiting.remove(job)
                show([_said(job) for job in running])
                if running:
                    _wait(next(iter(running.values())))
        finally:
            _stop(list(running.values()))


def _wait(process: subprocess.Popen[bytes]) -> None:
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_BETWEEN_LOOKS)


def _launch(job: Job, side_by_side: int, lock: int | None) -> subprocess.Popen[bytes]:
    job.set_up()
    threads = str(max(1, n_cores() // side_by_side))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    with open(job.log, "ab", opener=opener) as log:
        return subprocess.Popen(
            [sys.executable, "-m", *job.command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=() if lock is None else (lock,),
        )


def n_cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _stop(processes: list[subprocess.Popen[bytes]]) -> None:
    """Terminate the children, then kill those left: run folders are whole at any moment."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _said(job: Job) -> str:
    """Return the job's name and, while it prepares, its progress: there are no updates to count."""
    if job.folder.metrics.is_file() or not job.log.is_file():
        return job.name
    with open(job.log, "rb") as log:
        log.seek(max(0, os.path.getsize(job.log) - BYTES_OF_PROGRESS))
        bars = PROGRESS.findall(log.read().decode(errors="replace"))
    return f"{job.name} ({' '.join(bars[-1])})" if bars else job.name


def _failure(job: Job, process: subprocess.Popen[bytes]) -> str:
    text = job.log.read_text(encoding="utf-8", errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.splitlines()]
    tail = "\n".join(f"    {printable(line)}" for line in lines[-LINES_OF_LOG:] if line.strip())
    ended = f"ended with status {process.returncode}"
    return f"{job.name} {ended}; the end of its log, {job.log}:\n{tail}"


@contextmanager
def _locked(study: StudyFolder) -> Iterator[int | None]:
    """Children hold the lock as well: they may outlive a parent that was killed."""
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield None
        return
    with open(study.lock, "wb", opener=private_opener) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"'{study.path}' is in use: its runs are still going on") from error
        yield file.fileno()


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Make SIGTERM end the study as Ctrl-C does; otherwise it would leave the children running."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(plan: Plan, study: StudyFolder) -> Iterator[Callable[[list[str]], None]]:
    """One bar over the updates of all runs, read off their metrics."""
    files = [study.run(beta, seed).metrics for seed in plan.seeds for beta in plan.betas]
    done = sum(map(_n_lines, files))
    with UpdateProgress(total=plan.n_updates, initial=done, desc="study") as bar:

        def show(names: list[str]) -> None:
            now = sum(map(_n_lines, files)), ", ".join(names)
            if now != (bar.n, bar.postfix):
                bar.reach(*now)

        yield show


def _n_lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except OSError:
        return 0
