"""One run on several processes (ranks), each with an equal share of every batch.

All ranks draw the same random numbers, always for the whole batch, and each works on its local rows
of it: the number of ranks changes the training by rounding alone. Only the main rank, the first,
writes and prints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from transformers import LogitsProcessor

from kl_kernels.rl.collectives import from_all_ranks

T = TypeVar("T")

# Time that the others give the main rank to pretrain; a rank that dies is noticed at once.
GROUP_TIMEOUT = timedelta(hours=6)


def launch() -> tuple[Accelerator, Ranks]:
    """Join the process group of torchrun or `accelerate launch`; a process by itself has none.

    (Without a GPU `accelerate launch --cpu` starts one process, whatever it is asked for; it takes
    --multi_gpu to start several, which then find that there is no GPU.)
    """
    accelerator = Accelerator(
        # Kernels for CPU and CUDA exist; their float64 reference rules other accelerators out.
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=GROUP_TIMEOUT)],
    )
    if accelerator.num_processes == 1:
        return accelerator, SINGLE_PROCESS
    group = dist.group.WORLD
    return accelerator, Ranks(accelerator.process_index, accelerator.num_processes, group)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int
    world_size: int
    group: dist.ProcessGroup | None  # None: there is one process

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def check_batch_size(self, batch_size: int, minibatches: int) -> None:
        """Check that the ranks' shares of a minibatch are equal.

        Raises:
            ValueError: they are not.
        """
        if batch_size % (minibatches * self.world_size):
            raise ValueError(
                f"batch_size is {batch_size}; on {self.world_size} processes it must be a "
                f"multiple of minibatches x processes, {minibatches} x {self.world_size}"
            )

    def local_rows(self, n: int) -> slice:
        """Slice this rank's rows out of `n`."""
        share = n // self.world_size
        return slice(self.rank * share, (self.rank + 1) * share)

    def gather(self, local: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
        """Put the whole batch together from each rank's local rows."""
        if self.group is None:
            return local
        # The gathering adds up zeros, which changes no number, but a sum of bools is not a bool.
        summed = local.byte() if local.dtype == torch.bool else local
        return from_all_ranks(summed, self.group).flatten(0, 1).to(local.dtype)

    def sum(self, local: Tensor) -> Tensor:  # [...] -> [...]
        return self.gather(local[None]).sum(0)

    def max(self, local: Tensor) -> Tensor:  # [...] -> [...]
        return self.gather(local[None]).amax(0)

    def barrier(self) -> None:
        """Wait until all ranks get here."""
        if self.group is not None:
            dist.barrier(self.group)

    def shut_down(self) -> None:
        """Destroy the group, last of all: one that is still there may abort the process's exit."""
        if self.group is not None:
            dist.destroy_process_group()

    def on_main(self, make: Callable[[], T]) -> T:
        """Run `make` on the main rank alone; return its result, or raise its error, on all."""
        if self.group is None:
            return make()
        found: list[Any] = [None, None]
        if self.is_main:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[1] is not None:
            raise found[1]
        made: T = found[0]
        return made

    def on_each(self, make: Callable[[], T]) -> T:
        """Return `make()` of this rank, or raise on all ranks the ValueError of any.

        A rank that ended by itself would end the others before the main rank has printed why.
        """
        if self.group is None:
            return make()
        found: list[Any] = [None, None]
        try:
            found[0] = make()
        except ValueError as error:
            found[1] = str(error)
        messages: list[str | None] = [None] * self.world_size
        dist.all_gather_object(messages, found[1], group=self.group)
        for message in messages:
            if message is not None:
                raise ValueError(message)
        made: T = found[0]
        return made


SINGLE_PROCESS = Ranks(0, 1, None)


class ExponentialRace(LogitsProcessor):
    """Makes the likeliest token a sample from softmax(logits), by noise drawn for all ranks' rows.

    With E_i exponential, argmax p_i / E_i is i with probability p_i. torch.multinomial does the
    same, except that it would draw noise for the local rows alone.
    """

    def __init__(self, n_rows: int, local: slice) -> None:
        self.n_rows = n_rows
        self.local = local
        self.steps = 0

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:  # [b, S], [b, V] -> [b, V]
        self.steps += 1
        p = logits.softmax(-1)
        self.one_row = p[:1]  # the noise's width, dtype and device
        return p / self._draw_noise()[self.local]

    def catch_up(self, ranks: Ranks) -> int:
        """Draw the noise of ranks with longer answers; returns how many tokens longer they are."""
        longest = int(ranks.max(torch.tensor(self.steps, device=self.one_row.device)))
        missing = longest - self.steps
        for _ in range(missing):
            self._draw_noise()
        return missing

    def _draw_noise(self) -> Tensor:  # [B, V]
        return self.one_row.new_empty(self.n_rows, self.one_row.shape[-1]).exponential_()
