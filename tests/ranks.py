"""Processes that wait for work: functions run on several gloo ranks at once."""

import os
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = timedelta(seconds=60)


class Ranks:
    """A world of `n` processes, with groups of its first 1 ... n ranks.

    `ranks(function, ..., n)` returns what function(group, ...) returns on each of n ranks, or
    raises the first rank's error, with all ranks' errors as `errors`.
    """

    def __init__(self, n, timeout=TIMEOUT):
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        before = dict(os.environ)
        os.environ["OMP_NUM_THREADS"] = "1"
        try:
            for rank in range(n):
                here, there = context.Pipe()
                args = rank, n, f"file://{self.folder.name}/store", timeout, there
                process = context.Process(target=_work, args=args, daemon=True)
                process.start()
                self.pipes.append(here)
                self.processes.append(process)
        finally:
            os.environ.clear()
            os.environ.update(before)

    def __call__(self, function, *args, n):
        for pipe in self.pipes[:n]:
            pipe.send((function, args, n))
        replies = [pipe.recv() for pipe in self.pipes[:n]]
        errors = [error for error, _ in replies if error is not None]
        if errors:
            errors[0].errors = [error for error, _ in replies]
            raise errors[0]
        return [result for _, result in replies]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _work(rank, n, store, timeout, pipe):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # and with it, `torch.empty` is filled with NaN
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=n, timeout=timeout)
    groups = [dist.new_group(range(i + 1), timeout=timeout) for i in range(n)]
    while True:
        function, args, n_ranks = pipe.recv()
        try:
            reply = None, function(groups[n_ranks - 1], *args)
        except Exception as error:
            error.__notes__ = [traceback.format_exc()]
            reply = error, None
        pipe.send(reply)
