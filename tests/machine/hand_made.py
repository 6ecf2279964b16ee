"""Kernels of a few lines, written by hand, and their launches."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from .blocks import Kernel
from .machine import Machine
from .memory import Layout, Memory
from .parse import parse

REGISTERS = """
.reg .pred %p<8>; .reg .b16 %h<16>; .reg .b32 %r<32>; .reg .b64 %d<32>;
"""


def kernel(body: str, n_pointers: int = 1, shared: int = 0) -> Kernel:
    """A kernel whose parameters p0, p1, ... are in %d0, %d1, ... and whose thread is in %r0.

    Args:
        body: statements, without the last `ret`.
        n_pointers: parameters.
        shared: bytes of an array `memory`.
    """
    declared = ", ".join(f".param .u64 p{i}" for i in range(n_pointers))
    loads = " ".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(n_pointers))
    array = f".shared .align 16 .b8 memory[{shared}];" if shared else ""
    text = f".visible .entry f({declared}) {{ {REGISTERS} {array} {loads} mov.u32 %r0, %tid.x;\n"
    return Kernel(parse(f"{text}{body}\nret; }}")["f"])


def launch(
    code: Kernel,
    arrays: Sequence[np.ndarray],
    *,
    threads: int = 32,
    ctas: int = 1,
    cluster: int = 1,
    fresh: Sequence[int] = (),
    layouts: dict[int, list[Layout]] | None = None,
    counting: bool = False,
) -> Machine:
    """Run a kernel of `kernel` on arrays, which it may write to.

    Args:
        code: the kernel.
        arrays: what its pointers point to.
        threads: of a CTA.
        ctas: of the grid.
        cluster: CTAs of a cluster.
        fresh: which arrays nothing was written to before.
        layouts: of arrays that are not contiguous.
        counting: whether accesses are counted.
    """
    memory = Memory()
    for i, array in enumerate(arrays):
        data = array.view(np.uint8).reshape(-1)
        layout = (layouts or {}).get(i, [Layout(0, (len(data),), (1,), 1)])
        memory.add(f"p{i}", array.ctypes.data, data, layout, i in fresh)
    machine = Machine(memory, counting=counting)
    addresses = [array.ctypes.data for array in arrays]
    parameters = struct.pack(f"<{len(addresses)}Q", *addresses)
    machine.launch(code, grid=(ctas,), threads=threads, parameters=parameters, cluster=cluster)
    return machine


def aligned(n: int, dtype: type, value: float = 0) -> np.ndarray:
    """An array whose first element is at a multiple of 64 bytes."""
    size = n * np.dtype(dtype).itemsize
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    array = raw[start : start + size].view(dtype)
    array[:] = value
    return array


def kinds(machine: Machine) -> set[str]:
    return {fault.kind for fault in machine.faults}


# Registers by their bytes: the stem of their names, and the result's type.
STEMS = {2: ("h", np.uint16), 4: ("r", np.uint32), 8: ("d", np.uint64)}


def evaluate(body: str, *operands: np.ndarray, size: int = 4) -> np.ndarray:
    """Results of some statements, for each element of their operands.

    They run twice, each time in all threads: together, and apart for even threads and odd ones.

    Args:
        body: statements without labels. Operand k is in register 10 + k of its size, such as %r10;
            the result is left in register 9 of its own.
        operands: [n] each, of 2, 4 or 8 bytes.
        size: bytes of the result.

    Returns:
        [n] unsigned.
    """
    n, stem = len(operands[0]), STEMS[size][0]
    threads = -(-n // 32) * 32
    padded = [np.resize(np.ascontiguousarray(x), threads) for x in operands]
    arrays = [aligned(threads, x.dtype) for x in padded]
    for array, x in zip(arrays, padded):
        array[:] = x
    arrays.append(aligned(threads, STEMS[size][1]))
    last = len(operands)
    address = "mul.wide.u32 %d30, %r0, {}; add.u64 %d30, %d30, %d{};\n"
    loads = "".join(
        f"{address.format(x.itemsize, k)}"
        f"ld.global.b{8 * x.itemsize} %{STEMS[x.itemsize][0]}{10 + k}, [%d30];\n"
        for k, x in enumerate(operands)
    )
    store = f"{address.format(size, last)}st.global.b{8 * size} [%d30], %{stem}9;"
    apart = (
        "and.b32 %r31, %r0, 1; setp.eq.b32 %p7, %r31, 1; @%p7 bra ODD;\n"
        f"{body}\nbra BOTH;\nODD: {body}\nBOTH:\n"
    )
    results = []
    for statements in (body, apart):
        arrays[-1][:] = 0xA5
        code = kernel(loads + statements + store, n_pointers=last + 1)
        faults = launch(code, arrays, threads=threads).faults
        assert not faults, faults
        results.append(arrays[-1][:n].copy())
    assert np.array_equal(*results), "threads that part compute something else"
    return results[0]
