"""A basic block as a Python function on numpy arrays.

`block(R, C, m, n)` reads and writes registers in the dictionary `R`; `C` is the machine; `m` are
the numbers of the threads that execute it, None for all; `n` is their number. It returns what its
last instruction asks: the predicate of a branch or of a reducing barrier.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from . import arithmetic, integers, lower_conversions, lower_memory  # noqa: F401  two register families
from .lower_arithmetic import FAMILIES
from .lower_values import CANONICAL, NUMPY, Values

if TYPE_CHECKING:
    from .blocks import Block, Kernel

NAMES = {**NUMPY, "where": np.where, "full": np.full, "np": np, "A": arithmetic, "I": integers}


def compiled(kernel: Kernel, block: Block, full: bool) -> Callable:
    """Compile a block.

    Args:
        kernel: whose block it is.
        block: instructions.
        full: for all threads at once; otherwise for some of them, whose registers are gathered and
            scattered.

    Raises:
        NotImplementedError: an instruction is not understood; the message begins with its line.
    """
    values = Values(kernel, block)
    for instruction in block.instructions:
        try:
            FAMILIES[instruction.family](values, instruction)
        except (NotImplementedError, LookupError, ValueError, TypeError) as error:
            what = f"line {instruction.line}: {instruction.op} {instruction.args}"
            raise NotImplementedError(f"{what}: {type(error).__name__} {error}") from error
    values.emit(f"result = {answer(values, block)}")
    lines = ["def block(R, C, m, n):"]
    some = "" if full else "[m]"
    lines += [f" {name} = R[{name!r}]{some}" for name in values.needed]
    lines += [f" {line}" for line in values.lines]
    for name in values.written:
        if name in kernel.live_out[block.index]:
            lines += stored(values, name, full)
    lines.append(" return result")
    space = {**NAMES, **dict(values.constants.values())}
    title = f"<{kernel.function.name}, block {block.index}>"
    exec(compile("\n".join(lines), title, "exec"), space)
    found: Callable = space["block"]
    return found


def answer(values: Values, block: Block) -> str:
    """The last instruction's message to the machine, [n] bool, or None."""
    end = block.end
    if end is None:
        return "None"
    if end.op.startswith("bar.red"):
        return values.array(end.args[-1], "b1")
    return values.condition(end)


def stored(values: Values, name: str, full: bool) -> list[str]:
    canonical = CANONICAL[values.kernel.function.regs[name]]
    text = name if values.kinds[name] == canonical else f"{name}.view({canonical})"
    if full:
        return [f" R[{name!r}] = {text}"]
    # A copy, since an earlier full block may have put one array under two names.
    return [f" t = R[{name!r}].copy()", f" t[m] = {text}", f" R[{name!r}] = t"]
