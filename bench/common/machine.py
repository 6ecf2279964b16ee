"""Facts recorded with each measurement: the machine, the versions, the code that ran."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from kl_kernels.info import cpu_name, facts
from kl_kernels.versions import commit

PRODUCT_INSTRUCTIONS = (
    "fma",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_fp16",
)


def record() -> dict[str, object]:
    """Device, versions, commit, command and how busy the machine was, for a results file."""
    return {
        "device": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_at_start": round(os.getloadavg()[0], 2),
        "facts": facts(),
        "commit": commit(),
        "command": " ".join(["python", *_program(), *sys.argv[1:]]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def instruction_sets() -> list[str]:
    """Name those of the CPU's that matrix products can use, in Linux's words."""
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in PRODUCT_INSTRUCTIONS if name in flags]


def _program() -> list[str]:
    """Return the program as it was called; for a module, sys.argv has a path of the machine."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return sys.argv[:1] if spec is None else ["-m", spec.name]


def gpu_record() -> dict[str, object]:
    """The same for the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return record() | {
        "device": properties.name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "multiprocessors": properties.multi_processor_count,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "l2_bytes": properties.L2_cache_size,
    }


def chip_name(device: str) -> str:
    """Return the name of a chip in results files: "h200" of "NVIDIA H200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia")).strip("-")


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class PeakMemory:
    """Bytes of resident memory a block of code needed at its worst, on top of what was there."""

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)  # memory freed earlier must not come for free
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
        self.before = self._status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.extra = max(0, self._status("VmHWM") - self.before)

    @staticmethod
    def _status(name: str) -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {name}")


def last_level_cache_bytes(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of the last-level caches of all CPUs together; one that CPUs share counts once."""
    sizes: dict[int, dict[str, int]] = {}  # by level, by the CPUs that share it
    for cache in cpus.glob("cpu[0-9]*/cache/index*"):
        kind, level, cpu_list, size = (
            (cache / name).read_text().strip()
            for name in ("type", "level", "shared_cpu_list", "size")
        )
        if kind != "Instruction":
            sizes.setdefault(int(level), {})[cpu_list] = _bytes_of(size)
    if not sizes:
        raise RuntimeError(f"{cpus} tells of no caches: nothing says how much would sweep them")
    return sum(sizes[max(sizes)].values())


def _bytes_of(size: str) -> int:
    """Return the number that "32768K" stands for."""
    return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]


Clock = Callable[[], float]  # seconds


def read_bandwidth(n_bytes: int = 1 << 29, clock: Clock = time.perf_counter) -> float:
    """Bytes per second of the fastest plain reduction: the ceiling as far as torch can show it."""
    numbers = torch.ones(n_bytes // 8, dtype=torch.int64)
    return n_bytes / _fastest(clock, partial(torch.sum, numbers), partial(torch.amax, numbers))


def read_write_bandwidth(n_bytes: int = 1 << 29, clock: Clock = time.perf_counter) -> float:
    """The same of the sum of two tensors into a third, all three counted."""
    a, b, out = (torch.ones(n_bytes // 12) for _ in range(3))
    return n_bytes / _fastest(clock, partial(torch.add, a, b, out=out))


def _fastest(clock: Clock, *calls: Callable[[], object], rounds: int = 5) -> float:
    """Return seconds."""
    seconds = float("inf")
    for _ in range(rounds):
        for call in calls:
            start = clock()
            call()
            seconds = min(seconds, clock() - start)
    return seconds
