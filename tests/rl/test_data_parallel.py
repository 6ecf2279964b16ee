"""The how-to page's loop, run by ranks on parts of a batch, trains as one process on all of it."""

import pytest
import torch
import torch.distributed as dist
from pages import blocks_of
from tiny_lm import policy_and_reference
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import kl_kernels
from kl_kernels.rl.losses import AGGREGATIONS

B, PROMPT, T, V, N_RANKS, STEPS = 16, 3, 6, 24, 4, 3
BEFORE = slice(PROMPT - 1, -1)


def batch(reference, step):
    """Make all ranks' batch: step 1 leaves one rank without tokens, step 2 all ranks but one."""
    torch.manual_seed(1 + step)
    ids = torch.randint(V, (B, PROMPT + T))
    lengths = torch.randint(0, T + 1, (B,))
    lengths[:2], lengths[-1] = torch.tensor([1, 0]), T
    share = B // N_RANKS
    if step == 1:
        lengths[share : 2 * share] = 0
    if step == 2:
        lengths[:-share] = 0
    advantages = torch.randn(B, 1).expand(B, T).double()
    old_logprobs = -3 + 0.1 * torch.randn(B, T).double()
    return {
        "ids": ids,
        "token_ids": ids[:, PROMPT:],
        "mask": torch.arange(T) < lengths[:, None],
        "advantages": advantages,
        "old_logprobs": old_logprobs,
        "ref_logits": reference(ids).logits[:, BEFORE],
    }


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def by_ranks(group, wrapper, aggregation):
    """Run the page's loop, and return each step's gradients and the last weights."""
    policy, reference = policy_and_reference(vocab_size=V)
    model = policy
    if wrapper == "ddp":
        model = DistributedDataParallel(policy)
    else:
        mesh = init_device_mesh("cpu", (N_RANKS,))
        fully_shard(policy.model.layers[0], mesh=mesh)
        fully_shard(policy, mesh=mesh)
    names = {
        "torch": torch,
        "kl_kernels": kl_kernels,
        "policy": model,
        "aggregation": aggregation,
        "optimizer": torch.optim.SGD(policy.parameters(), lr=1.0),
        "beta": 0.1,
        "before": BEFORE,
    }
    (loop,) = blocks_of("how-to/any-trainer.md", "python", containing="global_denominator")
    own = torch.arange(B).chunk(N_RANKS)[dist.get_rank()]
    gradients = []
    for step in range(STEPS):
        exec(loop, names | {name: x[own] for name, x in batch(reference, step).items()})
        gradients.append([whole(weight.grad) for weight in policy.parameters()])
    return gradients, [whole(weight).detach() for weight in policy.parameters()]


def by_one_process(aggregation):
    policy, reference = policy_and_reference(vocab_size=V)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    gradients = []
    for step in range(STEPS):
        given = batch(reference, step)
        optimizer.zero_grad()
        out = kl_kernels.token_kl(
            policy(given["ids"]).logits[:, BEFORE],
            given["ref_logits"],
            given["token_ids"],
            mask=given["mask"],
        )
        loss, _ = kl_kernels.ppo_policy_loss(
            out.logprob,
            given["old_logprobs"],
            given["advantages"],
            given["mask"],
            aggregation=aggregation,
        )
        (loss + 0.1 * kl_kernels.aggregate(out.kl, given["mask"], aggregation)).backward()
        optimizer.step()
        gradients.append([weight.grad.clone() for weight in policy.parameters()])
    return gradients, [weight.detach() for weight in policy.parameters()]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_the_loop_of_the_page_trains_as_one_process_on_the_whole_batch(ranks, wrapper, aggregation):
    expected = by_one_process(aggregation)
    for found in ranks(by_ranks, wrapper, aggregation, n=N_RANKS):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def denominators(group, masks, aggregation):
    own = masks[dist.get_rank()]
    of_group = kl_kernels.global_denominator(own, aggregation, group=group)
    of_all = kl_kernels.global_denominator(own, aggregation)
    return of_group, of_all


MASKS = [
    torch.tensor([[1, 0, 1], [0, 0, 0]]),
    torch.tensor([[1, 1, 1]]),
    torch.zeros(2, 3, dtype=torch.bool),
    torch.zeros(0, 3),
]


@pytest.mark.parametrize(("aggregation", "count"), list(zip(AGGREGATIONS, [5, 2, 2, 2])))
def test_the_denominator_is_the_count_of_all_ranks_over_their_number(ranks, aggregation, count):
    for of_group, of_all in ranks(denominators, MASKS, aggregation, n=4):
        for denominator in (of_group, of_all):
            assert denominator.shape == ()
            assert denominator.dtype == torch.float32
            assert denominator == count / 4
    twice = [MASKS[0], MASKS[0], MASKS[1], MASKS[1]]  # as where two ranks share their data
    for of_both in ranks(denominators, twice, aggregation, n=4):
        assert of_both == (count / 2, count / 2)
    alone = kl_kernels.global_denominator(torch.cat([m.double() for m in MASKS]), aggregation)
    assert alone == count


def test_no_tokens_on_any_rank_make_a_denominator_of_zero(ranks):
    for of_both in ranks(denominators, [torch.zeros(2, 3)] * 4, "token-mean", n=4):
        assert of_both == (0, 0)


def outside(group):
    others = dist.new_group([1, 2, 3])
    if dist.get_rank() == 0:
        kl_kernels.global_denominator(MASKS[0], group=others)


def test_a_group_without_this_process_is_refused(ranks):
    with pytest.raises(ValueError, match="group does not hold this process"):
        ranks(outside, n=4)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((torch.ones(3),), ValueError, r"mask has shape \(3,\)"),
        (([1],), TypeError, "mask is a list"),
        ((torch.ones(1, 3), "mean"), ValueError, "aggregation is 'mean'; accepted: 'token-mean'"),
    ],
)
def test_other_arguments_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        kl_kernels.global_denominator(*given)
