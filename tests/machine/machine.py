"""Launches of kernels: threads that run together, one block of instructions after the other.

All threads of some CTAs run at once, at first in step. Where they part, those in the lowest block
run first, until they meet the others again. So the result is that of one possible order, and what
another order could change is told as a fault: races, values that several threads store at once,
memory that might not be there yet or no more.

Modelled: every instruction of the kernels' PTX with its rounding; global and shared memory, byte
by byte; asynchronous copies; barriers of CTAs and clusters; shuffles; shared memory of other CTAs
of a cluster. Not modelled: orders of memory weaker than sequential and the luck of scheduling, for
both of which the race detector stands in; caches and time; ptxas and the hardware's instructions
(SASS).
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

from .barriers import AT_CLUSTER, AT_CTA, RUNS, Barriers
from .blocks import Block, Kernel
from .counters import Counters
from .faults import Faults
from .lower_values import CANONICAL, NUMPY
from .memory import Memory
from .parse import Immediate, Instruction
from .reads import Reads
from .threads import WARP, line_of

THREADS_AT_ONCE = 4096  # more would fall out of the CPU's caches
VOTES = ("or", "and")  # that bar.red takes
STEPS = 2_000_000  # blocks that a kernel may execute before it is said to run for ever
# Registers that nothing was written to: NaN in every floating type, and no address.
POISON = {1: True, 2: 0x7FC1, 4: 0x7FC0DEAD, 8: 0x7FF8DEADBEEF7FC1}


class Machine:
    """Runs kernels on a memory.

    Args:
        memory: what kernels may touch.
        counting: whether to count instructions and accesses.
        seed: of the garbage that shared memory holds at first.

    Attributes:
        faults: of all launches.
        counters: of all launches, if they are counted.
    """

    def __init__(self, memory: Memory, *, counting: bool = False, seed: int = 1) -> None:
        self.memory, self.counting, self.seed = memory, counting, seed
        self.faults = Faults()
        self.counters = Counters()

    def launch(
        self,
        kernel: Kernel,
        *,
        grid: tuple[int, ...],
        threads: int,
        parameters: bytes,
        shared_bytes: int = 0,
        cluster: int = 1,
    ) -> None:
        """Run all CTAs of a grid.

        Args:
            kernel: the code.
            grid: CTAs along each dimension; all but the first are 1.
            threads: of a CTA, whole warps.
            parameters: the kernel's, as laid out in its PTX.
            shared_bytes: of dynamic shared memory.
            cluster: CTAs of a cluster.

        Raises:
            NotImplementedError: an instruction, or a launch, is not understood.
        """
        if any(n != 1 for n in grid[1:]) or threads % WARP or grid[0] % cluster:
            raise NotImplementedError(f"grid {grid} of {threads} threads in clusters of {cluster}")
        if kernel.function.threads not in (None, threads):
            kernel_threads = kernel.function.threads
            if threads > kernel_threads:
                raise NotImplementedError(f"{threads} threads of at most {kernel_threads}")
        launch = Launch(self, kernel, grid[0], threads, parameters, shared_bytes, cluster)
        together = max(1, THREADS_AT_ONCE // threads)
        together = -(-together // cluster) * cluster
        with np.errstate(all="ignore"):
            for first in range(0, grid[0], together):
                Running(launch, first, min(together, grid[0] - first)).run()
        if self.counting:
            self.counters.launches[kernel.function.name] += 1
            self.counters.kernels[kernel.function.name] = kernel


class Launch:
    """One launch: what all its CTAs have in common."""

    def __init__(
        self,
        machine: Machine,
        kernel: Kernel,
        grid: int,
        threads: int,
        parameters: bytes,
        dynamic: int,
        cluster: int,
    ) -> None:
        self.memory, self.faults, self.counters = machine.memory, machine.faults, machine.counters
        self.counting, self.seed = machine.counting, machine.seed
        self.kernel, self.grid, self.threads, self.cluster = kernel, grid, threads, cluster
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.shared_bytes = kernel.function.shared_bytes + dynamic
        self.reads = Reads()
        self._sources: dict[int, str] | None = None

    def source(self, line: int) -> str:
        """The line that an instruction was compiled from."""
        if self._sources is None:
            body = self.kernel.function.body
            self._sources = {i.line: i.where for i in body if not isinstance(i, str)}
        return self._sources.get(line, "")


class Running(Barriers):
    """CTAs of a launch, from their first instruction to their last."""

    def run(self) -> None:
        function = self.kernel.function
        registers = {
            name: np.full(
                self.n, POISON[function.regs[name]], NUMPY[CANONICAL[function.regs[name]]]
            )
            for name in self.kernel.stored
        }
        for _ in range(STEPS):
            running = (self.state == RUNS) & (self.pc < self.done)
            if running.any():
                chosen = self._choose(running)
                if chosen is None:
                    break
                self._execute(*chosen, registers)
            elif not self.release(registers):
                break
        else:
            self.fault("runs for ever", 0, f"more than {STEPS} blocks")
        self.check_waits()
        self.check_copies()
        self.check_exits()

    def _choose(self, running: ndarray) -> tuple[Block, ndarray] | None:
        """The lowest block, and which threads execute it; None if they wait for each other."""
        index = int(self.pc[running].min())
        block = self.kernel.blocks[index]
        if not block.whole_warps:
            return block, running & (self.pc == index)
        for index in map(int, np.unique(self.pc[running])):
            block = self.kernel.blocks[index]
            active = running & (self.pc == index)
            if not block.whole_warps:
                return block, active
            complete = (active | (self.pc >= self.done)).reshape(-1, WARP).all(1)
            active &= np.repeat(complete, WARP)
            if active.any():
                return block, active
        line = line_of(block.instructions[0])
        self.fault("deadlock", line, "threads of a warp wait for each other at different shuffles")
        return None

    def _execute(self, block: Block, active: ndarray, registers: dict[str, ndarray]) -> None:
        full = bool(active.all())
        m = None if full else np.flatnonzero(active)
        n = self.n if m is None else len(m)
        result = self.kernel.run(block.index, full)(registers, self, m, n)
        if self.launch.counting:
            self._count_block(block, m, n)
        self._leave(block, self.everyone if m is None else m, result)

    def _leave(self, block: Block, threads: ndarray, result: ndarray | None) -> None:
        """Move threads to the next block, or let them wait."""
        end = block.end
        if end is None:
            self.pc[threads] = block.next
        elif end.family == "bra":
            target = self.kernel.target(end)
            self.pc[threads] = target if result is None else np.where(result, target, block.next)
        elif end.family in ("ret", "exit", "trap"):
            if end.family == "trap":
                self.fault("trap", end.line, "trap")
            self.pc[threads] = (
                self.done if result is None else np.where(result, self.done, block.next)
            )
        elif end.predicate is not None:
            raise NotImplementedError(f"line {end.line}: a predicated {end.op}")
        elif end.op.startswith("barrier.cluster"):
            self.state[threads] = AT_CLUSTER
        else:
            self._check_barrier(end)
            if result is not None:
                self.answer[threads] = result
            self.state[threads] = AT_CTA

    def _check_barrier(self, end: Instruction) -> None:
        """Refuse barriers of a part of the CTA: all of its threads wait at the same one."""
        numbers = [a.bits for a in end.args if isinstance(a, Immediate)]
        known = end.family != "bar" or end.modifiers[0] == "sync" or end.modifiers[1] in VOTES
        if numbers not in ([0], [0, self.per_cta]) or not known:
            raise NotImplementedError(f"line {end.line}: {end.op} {end.args}")

    def _count_block(self, block: Block, m: ndarray | None, n: int) -> None:
        size = len(block.instructions) + (block.end is not None)
        warps = self.n // WARP if m is None else len(np.unique(m // WARP))
        name = self.kernel.function.name
        self.counters.thread_instructions[name] += size * n
        self.counters.warp_instructions[name] += size * warps
        self.counters.blocks[name, block.index] += n
