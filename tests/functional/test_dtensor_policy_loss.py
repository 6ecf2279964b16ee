"""`linear_policy_loss` of DTensor heads: one loss over all ranks' rows, or of this rank's own."""

import pytest
import torch
import torch.distributed as dist
from test_dtensor_heads import LAYOUTS
from test_dtensor_heads import inputs as heads_and_tokens
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kl_kernels
from kl_kernels.rl.losses import AGGREGATIONS

HEADS = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
LEAVES = HEADS[:3]
OPTIONS = {"kl_loss_coef": 0.3, "entropy_coef": 0.1, "temperature": 0.8, "memory_budget": 4000}
LAYOUTS = LAYOUTS | {"sequences": ((4,), [Shard(0)], [Replicate()])}  # two over four ranks


def inputs():
    *heads, ids, mask = heads_and_tokens()
    g = torch.Generator().manual_seed(1)
    return dict(zip(HEADS, heads)) | {
        "token_ids": ids,
        "mask": mask,
        "old_logprobs": -3 + torch.randn(ids.shape, generator=g),
        "advantages": torch.randn(ids.shape, generator=g),
        "weights": torch.rand(ids.shape, generator=g),
    }


def loss_and_gradients(given, **options):
    leaves = [given[name].requires_grad_() for name in LEAVES]
    loss, metrics = kl_kernels.linear_policy_loss(**given, **OPTIONS | options)
    (2 * loss).backward()
    return loss.detach(), metrics, [leaf.grad for leaf in leaves]


def by_definition(**options):
    """The same from logits."""
    given = inputs()
    heads = [given.pop(name).double() for name in HEADS]
    leaves = [x.requires_grad_() for x in heads[:3]]
    logits, ref_logits = (h @ w.T + b for h, w, b in (heads[:3], heads[3:]))
    options = OPTIONS | options
    del options["memory_budget"]
    loss, metrics = kl_kernels.fused_policy_loss(logits, ref_logits=ref_logits, **given, **options)
    (2 * loss).backward()
    return loss.detach(), metrics, [leaf.grad for leaf in leaves]


def assert_equal(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, check_dtype=False)


def of_dtensors(group, layout, options, plain):
    shape, of_hidden, of_weight = LAYOUTS[layout]
    mesh = dist.init_device_mesh("cpu", shape)
    given = {}
    for name, x in inputs().items():
        placements = of_weight if name in HEADS and not name.endswith("hidden") else of_hidden
        stays = plain and name not in HEADS
        given[name] = x if stays else distribute_tensor(x, mesh, placements)
    loss, metrics, gradients = loss_and_gradients(given, **options)
    assert isinstance(loss, DTensor) is not plain
    assert not any(isinstance(x, DTensor) for x in metrics.values())
    assert [g.placements for g in gradients] == [given[name].placements for name in LEAVES]
    return loss if plain else loss.to_local(), metrics, [g.full_tensor() for g in gradients]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("denominator", [None, 7.0])
def test_the_loss_is_that_of_all_rows_on_every_rank(ranks, layout, aggregation, denominator):
    options = {"aggregation": aggregation, "denominator": denominator}
    if layout == "rows" and aggregation in AGGREGATIONS[2:]:
        with pytest.raises(ValueError, match=f"hidden has .* split sequences, but .*{aggregation}"):
            ranks(of_dtensors, layout, options, False, n=4)
        return
    expected = by_definition(**options)
    found = ranks(of_dtensors, layout, options, False, n=4)
    for of_rank in found:
        assert_equal(of_rank, expected)
        assert torch.equal(of_rank[0], found[0][0])


@pytest.mark.parametrize("layout", ["replicas", "vocabulary"])
def test_plain_token_ids_give_a_plain_loss(ranks, layout):
    for found in ranks(of_dtensors, layout, {}, True, n=4):
        assert_equal(found, by_definition())


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_estimators_of_a_sharded_reference_are_those_of_the_whole(ranks, estimator):
    options = {"kl_estimator": estimator}
    for found in ranks(of_dtensors, "rows and vocabulary", options, False, n=4):
        assert_equal(found, by_definition(**options))


def of_own_tokens(group, shape, placements, n_calls):
    """Each rank's loss of plain hidden states of a position of its own; the third has no token."""
    mesh, rank = dist.init_device_mesh("cpu", shape), dist.get_rank()
    given = inputs()
    parameters = {
        name: distribute_tensor(given.pop(name), mesh, placements)
        for name in ("weight", "bias", "ref_weight", "ref_bias")
    }
    weights = [parameters[name].requires_grad_() for name in ("weight", "bias")]
    own = {name: x[:, rank : rank + 1] for name, x in given.items()}
    hidden = own.pop("hidden").requires_grad_()
    for _ in range(n_calls):
        loss, _ = kl_kernels.linear_policy_loss(
            hidden,
            **own,
            **parameters,
            **OPTIONS,
            denominator=kl_kernels.global_denominator(own["mask"]),
        )
        loss.backward()
    assert not isinstance(loss, DTensor)
    assert [w.grad.placements for w in weights] == [w.placements for w in weights]
    return loss.detach(), hidden.grad, [w.grad.full_tensor() for w in weights]


@pytest.mark.parametrize(
    ("shape", "placements"), [((4,), [Shard(0)]), ((2, 2), [Replicate(), Shard(0)])]
)
def test_gradients_of_own_tokens_are_averaged_over_the_ranks(ranks, shape, placements):
    """The fourth rank is beyond the last position: it has sequences without positions."""
    loss, _, (hidden, *weights) = by_definition()
    found = ranks(of_own_tokens, shape, placements, 2, n=4)
    losses, hiddens, of_weights = zip(*found)
    assert_equal(sum(losses) / 4, loss)
    assert_equal(torch.cat(hiddens, 1) / 4, hidden)
    for grads in of_weights:
        assert_equal(grads, weights)


def of_packed_dtensors(group, shards_rows):
    """The same sequences end to end, [N], with a head whose vocabulary is sharded, or with rows."""
    mesh = dist.init_device_mesh("cpu", (4,))
    plain = inputs()
    n_batch, n_tokens = plain["mask"].shape
    of_hidden, of_weight = Replicate(), Shard(0)
    if shards_rows:
        of_hidden, of_weight = of_weight, of_hidden
    given = {}
    for name, x in plain.items():
        is_row = name.endswith("hidden") or name not in HEADS
        x = x.flatten(0, 1) if is_row else x
        if name in HEADS or shards_rows:
            x = distribute_tensor(x, mesh, [of_hidden if is_row else of_weight])
        given[name] = x
    bounds = torch.arange(0, n_batch * n_tokens + 1, n_tokens)
    loss, _, gradients = loss_and_gradients(
        given, aggregation="seq-mean-token-mean", cu_seqlens=bounds
    )
    return loss, [gradient.full_tensor() for gradient in gradients]


def test_packed_sequences_beside_a_sharded_head(ranks):
    expected, _, gradients = by_definition(aggregation="seq-mean-token-mean")
    gradients[0] = gradients[0].flatten(0, 1)
    for loss, found in ranks(of_packed_dtensors, False, n=4):
        assert_equal(loss, expected)
        assert_equal(found, gradients)
    with pytest.raises(ValueError, match=r"cu_seqlens is given, but hidden has placements .*whole"):
        ranks(of_packed_dtensors, True, n=4)


def refused(group, kind):
    mesh = dist.init_device_mesh("cpu", (4,))
    given = inputs()
    hidden, weight = given["hidden"], given["weight"]
    replicated, sharded = ([Replicate()], [Shard(0)])
    for name in ("bias", "ref_bias", "ref_hidden", "ref_weight"):
        del given[name]
    if kind == "group":
        given |= {"weight": distribute_tensor(weight, mesh, sharded), "group": group}
    elif kind == "advantages":
        given["weight"] = distribute_tensor(weight, mesh, sharded)
        given["advantages"] = distribute_tensor(given["advantages"], mesh, replicated)
    elif kind == "plain weight":
        given["hidden"] = distribute_tensor(hidden, mesh, replicated)
    else:
        given["hidden"] = distribute_tensor(hidden, mesh, [Shard(1)])
        given["weight"] = distribute_tensor(weight, mesh, replicated)
    kl_kernels.linear_policy_loss(**given)


REFUSALS = {
    "group": (ValueError, "group and vocab_start are for plain tensors, but weight is a DTensor"),
    "advantages": (TypeError, r"advantages is a DTensor, but hidden is a plain.*to_local\(\)"),
    "plain weight": (TypeError, "weight is a Tensor, but hidden is a DTensor"),
    "plain tokens of rows": (TypeError, "token_ids is a Tensor, but hidden is a DTensor"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_other_dtensors_are_refused_by_name_on_every_rank(ranks, kind):
    error, message = REFUSALS[kind]
    with pytest.raises(error, match=message) as found:
        ranks(refused, kind, n=4)
    assert None not in found.value.errors
