"""csrc/cuda's launches, run as the PTX that nvcc makes of the kernels, on CPU tensors.

The host code is the real one, compiled by nvcc: which kernel, how many blocks, clusters, shared
memory. Its CUDA runtime is stand_in_runtime.cpp, which hands launches to this file. The operators
are those of tests/backends/host/cuda_on_host.py.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from host import cuda_on_host

from .blocks import Kernel
from .faults import Fault
from .launches import Launches
from .parse import parse

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/machine"
SOURCES = [HERE / "cuda_kernels.cu", HERE / "stand_in_runtime.cpp"]
LAUNCHES = {"production": ["-DKL_PRODUCTION_LAUNCH"], "small": []}


def nvcc() -> str:
    """Path of the compiler; an error where there is none, since nothing would be tested then."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if found is None:
        raise RuntimeError("the cuda backend's kernels are compiled by nvcc: set CUDA_HOME")
    return found


def nvcc_version() -> str:
    said = subprocess.run([nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    (version,) = re.findall(r"\bV([\d.]+)", said)
    return version


def flags() -> list[str]:
    """The flags that setup.py compiles the backend with."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NVCC_FLAGS":
            return list(ast.literal_eval(node.value))
    raise LookupError("setup.py has no NVCC_FLAGS")


@functools.cache
def build(arch: str, launches: str) -> Path:
    """Compile unless it is there: a folder with kernels.ptx and library.so.

    Args:
        arch: the GPU's, such as "sm_90".
        launches: a key of LAUNCHES: a GPU's launch policies, or the tests' small ones.
    """
    compiler = nvcc()
    options = [*flags(), "-Xcompiler=-fvisibility=default", "-lineinfo", *LAUNCHES[launches]]
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    made_of = hashlib.sha256(repr((version, arch, options)).encode())
    headers = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh")]
    for path in sorted([*headers, ROOT / "tests/backends/host/entry_points.h", *SOURCES]):
        made_of.update(path.read_bytes())
    target = BUILD / f"cuda-{arch}-{launches}-{made_of.hexdigest()[:16]}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            _compile(compiler, arch, options, Path(folder))
            done = Path(folder, "done")
            done.mkdir()
            for name in ("kernels.ptx", "library.so"):
                os.replace(Path(folder, name), done / name)
            try:
                os.replace(done, target)
            except OSError:  # another process was first
                assert target.exists()
    return target


def _compile(compiler: str, arch: str, options: list[str], folder: Path) -> None:
    """Compile to PTX and no further: ptxas would take minutes."""
    code = f"-gencode=arch=compute_{arch[3:]},code=compute_{arch[3:]}"
    kernels, runtime = map(str, SOURCES)
    _run(compiler, *options, code, "-c", kernels, "-o", "kernels.o", "--keep", cwd=folder)
    os.replace(folder / "cuda_kernels.ptx", folder / "kernels.ptx")
    link = ["-shared", "-cudart=none", "-Xcompiler=-fPIC", runtime, "kernels.o"]
    _run(compiler, code, *link, "-o", "library.so", cwd=folder)


def _run(*command: str, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}: {result.stderr}")


class CudaLaunches(Launches):
    """Inside the context, `cuda_on_host`'s operators run nvcc's kernels on the machine.

    Args:
        arch: the GPU's, such as "sm_90".
        launches: a key of LAUNCHES.
        counting: whether to count instructions and accesses.
    """

    def __init__(self, arch: str, launches: str = "production", *, counting: bool = False) -> None:
        super().__init__(counting=counting)
        folder = build(arch, launches)
        self.library = ctypes.CDLL(str(folder / "library.so"))
        for name in ("host_scratch_bytes", "host_mix_scratch_bytes"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.ptx = kernels_apart((folder / "kernels.ptx").read_text())
        self.device = cuda_on_host.H200 if int(arch[3:]) >= 90 else A100
        self._launcher = LAUNCHER(self._take)  # kept, as the library does not
        self.library.set_launcher(self._launcher)
        self._error: BaseException | None = None

    def __enter__(self) -> CudaLaunches:
        super().__enter__()
        self._patches.enter_context(patch.object(cuda_on_host, "library", lambda: self.library))
        self._plain = cuda_on_host.backend
        self._patches.enter_context(patch.object(cuda_on_host, "backend", self._backend))
        return self

    def kernels(self) -> SimpleNamespace:
        return self._plain(self.device)

    def _backend(self, device: tuple[int, int, int] | None = None) -> SimpleNamespace:
        """`cuda_on_host.backend` of this library."""
        return self.operators(self._plain(device or self.device))

    def _watched(self, name: str, operator: Any) -> Any:
        watched = super()._watched(name, operator)

        def raising(arguments: Any) -> Any:
            self._error = None
            try:
                return watched(arguments)
            except AssertionError as refused:
                raise self._error or refused from refused

        return raising

    def take_faults(self) -> list[Fault]:
        return [fault for fault in super().take_faults() if not is_accepted(fault)]

    def _take(
        self, name: bytes, blocks: int, threads: int, shared: int, cluster: int, values: Any
    ) -> int:
        """One launch, in the middle of the library's code, which an exception must not cross."""
        try:
            kernel = self.kernel_of(name.decode())
            parameters = bytearray(kernel.function.param_bytes)
            for value, (offset, size, _) in zip(values, kernel.function.params.values()):
                parameters[offset : offset + size] = ctypes.string_at(value, size)
            self.launch(
                kernel,
                grid=(blocks,),
                threads=threads,
                parameters=bytes(parameters),
                shared_bytes=shared,
                cluster=cluster,
            )
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def kernel_of(self, name: str) -> Kernel:
        return self.lowered.get(name) or self.lower(name, parse(self.ptx[name])[name])


# Faults that are none: bytes read beside those that are needed, shifted out, and not there yet.
ACCEPTED = [("shared uninitialised", "smem_row.cuh", "const uint2 pair = pairs[")]


def is_accepted(fault: Fault) -> bool:
    file, _, line = fault.source.partition(":")
    return any(
        fault.kind == kind and file == name and source_line(file, int(line)).startswith(text)
        for kind, name, text in ACCEPTED
    )


@functools.cache
def source_line(file: str, line: int) -> str:
    return (ROOT / "csrc/cuda" / file).read_text().splitlines()[line - 1].strip()


def kernels_apart(ptx: str) -> dict[str, str]:
    """A file of PTX for each kernel, by name: parsing all of them would take long."""
    starts = [entry.start() for entry in ENTRY.finditer(ptx)]
    last = FILES.search(ptx, starts[-1])  # sources are named at the end
    bounds = [*starts, last.start() if last else len(ptx)]
    sources = "\n".join(FILES.findall(ptx, bounds[-1]))
    return {
        ENTRY.match(ptx, start)[1]: ptx[: starts[0]] + ptx[start:end] + sources
        for start, end in itertools.pairwise(bounds)
    }


ENTRY = re.compile(r"^(?:\.visible |\.weak )?\.entry ([\w$]+)\(", re.MULTILINE)
FILES = re.compile(r"^\s*\.file\b.*$", re.MULTILINE)

# The shared memory of a block and of an SM, in bytes, and no clusters.
A100 = 163 << 10, 164 << 10, 0
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_size_t,
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)
