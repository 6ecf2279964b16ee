"""Timing of calls: of short kernels by replays of CUDA graphs, of calls of any kind by events, or
by a wall clock on the CPU, the caches swept before or not.

A replay goes over buffers that no cache holds: a graph holds enough launches to outlast the clock's
resolution and the launch of the graph itself; successive launches read different buffers, of more
than four times the L2 in all. On the CPU, a wall clock around the same launches: enough to try this
file.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.common.machine import Clock

Launch = Callable[[Any], Any]  # on one set of buffers
CACHES = 4  # times the last-level cache that the buffers of a round take together, or a sweep
REPLAY_BYTES = 4 << 30  # a replay moves about this much: a millisecond at 4 TB/s
MOST_LAUNCHES = 512  # per replay, where fewer sets of buffers would do


def n_buffer_sets(bytes_per_set: int, l2_bytes: int) -> int:
    return max(1, math.ceil(CACHES * l2_bytes / bytes_per_set))


def n_rounds_of_sets(n_sets: int, bytes_per_set: int) -> int:
    """Return how often a replay goes over all the sets."""
    wanted = math.ceil(REPLAY_BYTES / (n_sets * bytes_per_set))
    return max(1, min(wanted, MOST_LAUNCHES // n_sets))


class Replay:
    """Many launches of one callable as one timed unit; calling it gives seconds per launch."""

    def __init__(self, launch: Launch, buffer_sets: Sequence[Any], rounds: int):
        self.n_launches = rounds * len(buffer_sets)
        # Results live until their set's next turn: each set writes to memory of its own, so that
        # writes are as cold as reads.
        self._results: list[Any] = [None] * len(buffer_sets)

        def all_launches() -> None:
            for _ in range(rounds):
                for i, buffers in enumerate(buffer_sets):
                    self._results[i] = launch(buffers)

        self._run = all_launches
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self) -> Replay:
        """Warm up on a side stream (compiles; capture must not), then record the launches."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self._results = [None] * len(self._results)
        torch.cuda.empty_cache()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._run()
        self._graph.replay()
        torch.cuda.synchronize()
        return self

    def __call__(self) -> float:
        if self._graph is None:
            start = time.perf_counter()
            self._run()
            return (time.perf_counter() - start) / self.n_launches
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._graph.replay()  # hides the launch of the one that is timed
        begin.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3 / self.n_launches


def replay(launch: Launch, buffer_sets: Sequence[Any], rounds: int, device: str) -> Replay:
    ready = Replay(launch, buffer_sets, rounds)
    if device == "cuda":
        return ready.capture()
    launch(buffer_sets[0])  # warms up
    return ready


def cold_buffer(cache_bytes: int) -> torch.Tensor:
    """Return memory to sweep caches of `cache_bytes` with: written, so that its pages are there."""
    return torch.ones(CACHES * cache_bytes // 8, dtype=torch.int64)


def sweep(cold: torch.Tensor) -> None:
    """Leave nothing but `cold` in the caches, on the CPU unchanged and thus with nothing to write.

    A fill would do on the CPU only where it does not write past the caches, as large ones do.
    """
    if cold.is_cuda:
        cold.zero_()
    else:
        cold.sum()


def timed(
    call: Callable[[Any], Any],
    x: Any,
    cold: torch.Tensor | None,
    clock: Clock = time.perf_counter,
) -> float:
    """Seconds of one call, after `cold`, where there is one, has swept the caches.

    On a GPU, of the device and by its own clock: events are recorded while the sweep still runs, so
    that the host's launches are hidden behind it as they are behind a model's work, and count only
    as far as the device waits for them.
    """
    if cold is not None:
        sweep(cold)
    if cold is None or not cold.is_cuda:
        start = clock()
        call(x)
        return clock() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call(x)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def from_python(call: Callable[[Any], Any], x: Any, device: str, n: int = 20) -> float:
    """Seconds of a call, one after another as Python makes them: whichever of host and GPU waits.

    Few rows take the host longer than the GPU, which a replay hides.
    """
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    call(x)
    wait()
    start = time.perf_counter()
    for _ in range(n):
        call(x)
    wait()
    return (time.perf_counter() - start) / n


def interleaved(replays: dict[str, Replay], turns: int) -> dict[str, list[float]]:
    """Seconds per launch; each turn times each contender once, so that drift is shared."""
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(turns):
        for name, ready in replays.items():
            times[name].append(ready())
    return times


def peak_bytes(launch: Launch, buffers: Any, device: str) -> int:
    """Return a call's peak allocation, results included; 0 on the CPU (see machine.py there)."""
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = launch(buffers)
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before
