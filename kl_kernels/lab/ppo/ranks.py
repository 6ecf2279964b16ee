"""One run on several processes (ranks), each with an equal share of every batch.

All ranks draw the same random numbers, always for the whole batch, and each works on its own rows:
what is trained does not depend on their number, but for rounding. Whatever is written, or said, is
the first rank's business.
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

from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.rl.collectives import from_all_ranks

T = TypeVar("T")

# How long the others wait for the first rank to pretrain; a rank that dies is noticed at once.
PATIENCE = timedelta(hours=6)


def launch() -> tuple[Accelerator, Ranks]:
    """The process group that torchrun asks for, or `accelerate launch`; of one process, none.

    (Without a GPU `accelerate launch --cpu` starts one process, whatever it is asked for; it takes
    --multi_gpu to start several, which then find that there is no GPU.)
    """
    accelerator = Accelerator(
        # Kernels for CPU and CUDA exist; their float64 reference rules other accelerators out.
        cpu=not torch.cuda.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.num_processes == 1:
        return accelerator, ALONE
    group = dist.group.WORLD
    return accelerator, Ranks(accelerator.process_index, accelerator.num_processes, group)


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run."""

    rank: int
    n: int
    group: dist.ProcessGroup | None  # None: there is one process

    @property
    def first(self) -> bool:
        return self.rank == 0

    def check(self, config: PPOConfig) -> None:
        """ValueError if the ranks' shares of a minibatch would not be equal."""
        if config.batch_size % (config.minibatches * self.n):
            raise ValueError(
                f"batch_size is {config.batch_size}; on {self.n} processes it has to be a multiple "
                f"of minibatches x processes, {config.minibatches} x {self.n}"
            )

    def rows(self, n: int) -> slice:
        """This rank's of `n` rows."""
        share = n // self.n
        return slice(self.rank * share, (self.rank + 1) * share)

    def all_rows(self, own: Tensor) -> Tensor:  # [b, ...] -> [B, ...]
        """The whole batch, from each rank's rows of it."""
        if self.group is None:
            return own
        # Adding zeros changes no number; a sum of bools is none.
        summed = own.byte() if own.dtype == torch.bool else own
        return from_all_ranks(summed, self.group).flatten(0, 1).to(own.dtype)

    def total(self, own: Tensor) -> Tensor:  # [...] -> [...]
        return self.all_rows(own[None]).sum(0)

    def largest(self, own: Tensor) -> Tensor:  # [...] -> [...]
        return self.all_rows(own[None]).amax(0)

    def wait(self) -> None:
        """For all ranks to get here."""
        if self.group is not None:
            dist.barrier(self.group)

    def leave(self) -> None:
        """The last thing a process does: a group still there may abort it at its exit."""
        if self.group is not None:
            dist.destroy_process_group()

    def on_first(self, make: Callable[[], T]) -> T:
        """What `make` returns on the first rank, which alone runs it; or its error, everywhere."""
        if self.group is None:
            return make()
        found: list[Any] = [None, None]
        if self.first:
            try:
                found[0] = make()
            except Exception as error:
                found[1] = error
        dist.broadcast_object_list(found, src=0, group=self.group)
        if found[1] is not None:
            raise found[1]
        made: T = found[0]
        return made

    def each(self, make: Callable[[], T]) -> T:
        """Return `make()` of this rank, or raise on all ranks the ValueError of any.

        A rank that ended on its own would end the others before the first of them, which alone
        speaks, has said why.
        """
        if self.group is None:
            return make()
        found: list[Any] = [None, None]
        try:
            found[0] = make()
        except ValueError as error:
            found[1] = str(error)
        messages: list[str | None] = [None] * self.n
        dist.all_gather_object(messages, found[1], group=self.group)
        for message in messages:
            if message is not None:
                raise ValueError(message)
        made: T = found[0]
        return made


ALONE = Ranks(0, 1, None)


class ExponentialRace(LogitsProcessor):
    """Makes the likeliest token a sample from softmax(logits), by noise drawn for all ranks' rows.

    With E_i exponential, argmax p_i / E_i is i with probability p_i; it is what torch.multinomial
    does, except that it would draw noise for this rank's rows alone.
    """

    def __init__(self, n_rows: int, own: slice) -> None:
        self.n_rows = n_rows
        self.own = own
        self.steps = 0

    def __call__(self, input_ids: Tensor, logits: Tensor) -> Tensor:  # [b, S], [b, V] -> [b, V]
        self.steps += 1
        p = logits.softmax(-1)
        self.like = p[:1]
        return p / self._noise()[self.own]

    def catch_up(self, ranks: Ranks) -> int:
        """Draw what ranks with longer answers drew; returns how many tokens longer they are."""
        longest = int(ranks.largest(torch.tensor(self.steps, device=self.like.device)))
        missing = longest - self.steps
        for _ in range(missing):
            self._noise()
        return missing

    def _noise(self) -> Tensor:  # [B, V]
        return self.like.new_empty(self.n_rows, self.like.shape[-1]).exponential_()
