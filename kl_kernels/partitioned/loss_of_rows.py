"""The policy loss of a block of rows, whose logits are all here or spread over several ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from kl_kernels.algebra.epilogues import policy_losses
from kl_kernels.algebra.parts import local_token_ids
from kl_kernels.partitioned.functions import Saved, upstream_of
from kl_kernels.partitioned.head_gradients import write_kl_gradient
from kl_kernels.partitioned.heads import HeadOptions, fold_logits
from kl_kernels.partitioned.shards import Shard, exchange
from kl_kernels.schemas import PolicyLossArgs


def loss_of_rows(a: PolicyLossArgs, options: HeadOptions) -> Tensor:
    """Return the loss's terms [8, 1, n], and write the gradient of the logits that are here.

    Args:
        a: the operator's arguments, of rows that all count; token ids of the whole vocabulary.
        options: of the heads, with the shard that they hold.
    """
    if options.shard is not None:
        return _of_shards(a, options, options.shard)
    terms: Tensor = torch.ops.kl_kernels.policy_loss(*a, options.backend)
    return terms


def _of_shards(a: PolicyLossArgs, options: HeadOptions, shard: Shard) -> Tensor:
    """Each rank folds its own logits; one collective brings the states together in between.

    The few numbers of a row are then reckoned on every rank, from the same bits.
    """
    vocab_size, dtype = a.logits.shape[-1], a.logits.dtype
    logits = [a.logits[0]] if a.ref_logits is None else [a.logits[0], a.ref_logits[0]]
    ids = local_token_ids(a.token_ids, shard.start, vocab_size)
    state = fold_logits(logits, ids, options)
    whole = exchange(state, shard, vocab_size, a.token_ids, None, options.backend)
    terms, g = policy_losses(whole.outputs, a)
    if a.grad_logits is not None:
        upstream = upstream_of(g, a, dtype)
        if upstream.kl is None:
            del logits[1:]  # the reference's are not read a second time
        saved = Saved(whole.policy_state, whole.ref_state, whole.outputs.kl, whole.outputs.entropy)
        write_kl_gradient(logits, ids, options, upstream, saved, a.grad_logits[0])
    return torch.stack(terms).to(dtype)


def largest_shard(vocab_size: int, n_rows: int, shard: Shard, device: torch.device) -> int:
    """Logits of the rank that has the most, so that all ranks cut their rows into equal blocks.

    The host waits for it, where it has just waited for the number of rows.

    Raises:
        ValueError: ranks count other numbers of rows, on all ranks.
    """
    # Filled where they are: a copy from the host would wait as well.
    sizes = torch.stack([torch.full((), n, device=device) for n in (vocab_size, n_rows, -n_rows)])
    dist.all_reduce(sizes, op=dist.ReduceOp.MAX, group=shard.group)
    if sizes.is_meta:  # without data, shards are of one size
        return vocab_size
    largest, most, fewest = sizes.tolist()
    if most != -fewest:
        raise ValueError(
            f"the masks of the ranks hold {-fewest} to {most} tokens; hidden states, token_ids, "
            "mask and all else per token must be the same on all ranks of a group"
        )
    return int(largest)
