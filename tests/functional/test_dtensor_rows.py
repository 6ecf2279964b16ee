"""Losses and top-k of DTensor logits are those of all ranks' rows; no function mixes in silence."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kl_kernels
from kl_kernels.rl.losses import AGGREGATIONS

B, T, V = 6, 5, 23
LAYOUTS = {
    "replicas": ((4,), [Replicate()]),
    "sequences": ((4,), [Shard(0)]),  # 6 over 4: two, two, two and none
    "positions": ((4,), [Shard(1)]),
    "both": ((2, 2), [Shard(0), Shard(1)]),
    "sequences, twice": ((2, 2), [Shard(0), Replicate()]),
}


def inputs():
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn(B, T, V, generator=g) for _ in range(2))
    per_token = {
        "old_logprobs": -3 + torch.randn(B, T, generator=g),
        "advantages": torch.randn(B, T, generator=g),
        "weights": torch.rand(B, T, generator=g),
        "mask": torch.arange(T) < torch.tensor([5, 1, 0, 3, 4, 2])[:, None],
        "token_ids": torch.randint(V, (B, T), generator=g),
    }
    return logits, ref_logits, per_token


def loss_and_gradient(logits, ref_logits, per_token, **options):
    logits.requires_grad_()
    loss, metrics = kl_kernels.fused_policy_loss(
        logits, ref_logits=ref_logits, kl_loss_coef=0.3, entropy_coef=0.1, **per_token, **options
    )
    (2 * loss).backward()
    return loss.detach(), metrics, logits.grad


def loss_of_dtensors(group, layout, options, plain):
    shape, placements = LAYOUTS[layout]
    mesh = dist.init_device_mesh("cpu", shape)
    logits, ref_logits, per_token = inputs()
    x, y = (distribute_tensor(z, mesh, placements) for z in (logits, ref_logits))
    if not plain:
        per_token = {n: distribute_tensor(z, mesh, placements) for n, z in per_token.items()}
    loss, metrics, grad = loss_and_gradient(x, y, per_token, **options)
    assert isinstance(loss, DTensor) is not plain
    assert grad.placements == tuple(placements)
    return loss if plain else loss.to_local(), metrics, grad.full_tensor()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 7.0, torch.tensor(7.0)])
def test_the_loss_is_that_of_all_rows_on_every_rank(ranks, layout, aggregation, denominator):
    options = {"aggregation": aggregation, "denominator": denominator}
    if layout in ("positions", "both") and aggregation in AGGREGATIONS[2:]:
        with pytest.raises(
            ValueError, match=f"which split sequences, but aggregation .{aggregation}"
        ):
            ranks(loss_of_dtensors, layout, options, False, n=4)
        return
    expected = loss_and_gradient(*inputs(), **options)
    for found in ranks(loss_of_dtensors, layout, options, False, n=4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_plain_token_ids_give_a_plain_loss(ranks):
    expected = loss_and_gradient(*inputs())
    for found in ranks(loss_of_dtensors, "replicas", {}, True, n=4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def chosen(logits, ids, logprobs, mask):
    return {
        "top-k": kl_kernels.topk_kl(logits, ids, logprobs, mask=mask),
        "several": kl_kernels.selective_log_softmax(logits, ids, 0.7, mask),
        "one": kl_kernels.selective_log_softmax(logits, ids[..., 0], 0.7, mask),
    }


def of_several():
    logits, ref_logits, per_token = inputs()
    logprobs, ids = ref_logits.log_softmax(-1).topk(3)
    return logits, ids, logprobs, per_token["mask"]


def with_gradient(x, y):
    return y.detach(), torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


def chosen_of_dtensors(group, layout):
    shape, placements = LAYOUTS[layout]
    mesh = dist.init_device_mesh("cpu", shape)
    logits, *others = (distribute_tensor(x, mesh, placements) for x in of_several())
    found = {}
    for name, y in chosen(logits.requires_grad_(), *others).items():
        assert y.placements == tuple(placements)
        value, grad = with_gradient(logits, y)
        found[name] = value.full_tensor(), grad.full_tensor()
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_chosen_tokens_of_dtensors_are_those_of_all_rows(ranks, layout):
    logits, *others = of_several()
    logits.requires_grad_()
    expected = {n: with_gradient(logits, y) for n, y in chosen(logits, *others).items()}
    for found in ranks(chosen_of_dtensors, layout, n=4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def sampled_of_shards(group):
    mesh = dist.init_device_mesh("cpu", (4,))
    logits, _, per_token = inputs()
    x = distribute_tensor(logits, mesh, [Shard(2)]).requires_grad_()
    logprob = kl_kernels.selective_log_softmax(x, per_token["token_ids"], 0.7, per_token["mask"])
    value, grad = with_gradient(x, logprob)
    return value, grad.full_tensor()


def test_one_token_per_position_may_be_of_a_sharded_vocabulary(ranks):
    logits, _, per_token = inputs()
    logits.requires_grad_()
    logprob = kl_kernels.selective_log_softmax(
        logits, per_token["token_ids"], 0.7, per_token["mask"]
    )
    for found in ranks(sampled_of_shards, n=4):
        torch.testing.assert_close(found, with_gradient(logits, logprob), rtol=1e-5, atol=1e-6)


CALLS = {
    "token_stats": ("logits", "token_ids", "mask"),
    "token_kl": ("logits", "ref_logits", "token_ids", "mask"),
    "token_jsd": ("logits", "ref_logits", "mask"),
    "kl_rewards": ("logits", "ref_logits", "token_ids", "scores", "mask"),
    "fused_policy_loss": ("logits", "token_ids", "old_logprobs", "advantages", "mask", "weights"),
    "topk_kl": ("logits", "topk_ids", "topk_logprobs", "mask"),
    "selective_log_softmax": ("logits", "index", "row_mask"),
    "kl_penalty": ("logprobs", "ref_logprobs", "mask"),
    "compute_rewards": ("scores", "kl", "mask"),
    "compute_gae": ("rewards", "values", "mask"),
    "masked_whiten": ("x", "mask"),
    "ppo_policy_loss": ("logprobs", "old_logprobs", "advantages", "mask", "weights"),
    "ppo_value_loss": ("values", "old_values", "returns", "mask"),
    "aggregate": ("loss_per_token", "mask"),
    "importance_weights": ("logprobs", "rollout_logprobs", "mask"),
    "global_denominator": ("mask",),
    "missing_eos_penalty": ("scores", "ended"),
}
NUMBERS = {
    "kl_rewards": {"kl_coef": 0.1},
    "compute_rewards": {"kl_coef": 0.1},
    "missing_eos_penalty": {"penalty": 1.0},
}
ONLY_PLAIN = ("compute_rewards", "compute_gae", "global_denominator")


def arguments(name):
    logits, ref_logits, per_token = inputs()
    known = per_token | {
        "logits": logits,
        "ref_logits": ref_logits,
        "scores": torch.zeros(B),
        "ended": torch.ones(B),
        "row_mask": per_token["mask"],
        "index": per_token["token_ids"],
        "topk_ids": per_token["token_ids"][..., None],
        "topk_logprobs": -torch.ones(B, T, 1),
    }
    return {each: known.get(each, -torch.ones(B, T)) for each in CALLS[name]}


def mixed(group, name, odd):
    """Every rank's error, of one argument that alone is a DTensor, or alone is none."""
    mesh = dist.init_device_mesh("cpu", (4,))
    given = arguments(name)
    whole = {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in given.items()}
    few, many = (whole, given) if odd[1] else (given, whole)
    try:
        getattr(kl_kernels, name)(**many | {odd[0]: few[odd[0]]}, **NUMBERS.get(name, {}))
    except (TypeError, ValueError) as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", CALLS)
def test_dtensors_among_plain_tensors_are_named(ranks, name):
    for odd in CALLS[name]:
        for is_dtensor in (True, False):
            if len(CALLS[name]) == 1 and not is_dtensor:
                continue
            for message in ranks(mixed, name, (odd, is_dtensor), n=4):
                assert message is not None, (odd, is_dtensor)
                assert "DTensor" in message, (odd, is_dtensor)
                assert any(each in message for each in CALLS[name])
                assert "aten" not in message, (odd, is_dtensor)


def refused(group, kind):
    mesh = dist.init_device_mesh("cpu", (4,))
    if kind in ONLY_PLAIN:
        given = {n: distribute_tensor(x, mesh, [Shard(0)]) for n, x in arguments(kind).items()}
        getattr(kl_kernels, kind)(**given, **NUMBERS.get(kind, {}))
    elif kind == "group":
        x = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
        kl_kernels.masked_mean(x, x, group=group)
    else:
        logits, ids, logprobs, _ = of_several()
        x = distribute_tensor(logits, mesh, [Shard(2)])
        calls = {
            "loss": lambda: loss_and_gradient(x, x.detach(), inputs()[2]),
            "top-k": lambda: kl_kernels.topk_kl(x, ids, logprobs),
            "several": lambda: kl_kernels.selective_log_softmax(x, ids),
        }
        calls[kind]()


@pytest.mark.parametrize("kind", [*ONLY_PLAIN, "group"])
def test_what_takes_no_dtensors_says_so(ranks, kind):
    with pytest.raises(TypeError, match=r"is a DTensor; it must be a plain tensor.*to_local\(\)"):
        ranks(refused, kind, n=4)


@pytest.mark.parametrize("kind", ["loss", "top-k", "several"])
def test_a_sharded_vocabulary_is_refused_where_a_row_is_needed_whole(ranks, kind):
    with pytest.raises(ValueError, match=r"which shard the vocabulary.*redistribute.*token_kl"):
        ranks(refused, kind, n=4)
