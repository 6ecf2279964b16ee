"""Linear heads of DTensors give what the whole head gives of all rows, or name what is wrong."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import kl_kernels

V = 22  # over four ranks: 6, 6, 6 and 4
LAYOUTS = {
    "replicas": ((4,), [Replicate()], [Replicate()]),
    "vocabulary": ((4,), [Replicate()], [Shard(0)]),
    "rows": ((4,), [Shard(1)], [Replicate()]),
    "rows and vocabulary": ((2, 2), [Shard(0), Replicate()], [Replicate(), Shard(0)]),
}


def inputs():
    g = torch.Generator().manual_seed(0)
    hidden, ref_hidden = torch.randn(2, 3, 5, generator=g), torch.randn(2, 3, 7, generator=g)
    heads = [torch.randn(V, d, generator=g) for d in (5, 7)]
    biases = [torch.randn(V, generator=g) for _ in range(2)]
    ids = torch.randint(V, (2, 3), generator=g)
    mask = torch.tensor([[True, True, False], [True, False, True]])
    return hidden, heads[0], biases[0], ref_hidden, heads[1], biases[1], ids, mask


def quantities(name, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, ids, mask):
    options = {"bias": bias, "mask": mask, "temperature": 0.8, "memory_budget": 4000}
    if name == "stats":
        return kl_kernels.linear_token_stats(hidden, weight, ids, **options)
    options["ref_bias"] = ref_bias
    heads = hidden, weight, ref_hidden, ref_weight
    if name == "kl":
        return kl_kernels.linear_token_kl(*heads, ids, **options)
    beta = {"jsd": 0.3, "reverse kl": 1.0}[name]
    return (kl_kernels.linear_token_jsd(*heads, beta=beta, **options),)


def outputs_and_gradients(name, given, leaves):
    outputs = quantities(name, *given)
    sum((i + 1) * x.sum() for i, x in enumerate(outputs)).backward()
    return [x.detach() for x in outputs], [leaf.grad for leaf in leaves]


def of_dtensors(group, name, layout, plain_ids):
    shape, of_hidden, of_weight = LAYOUTS[layout]
    mesh = dist.init_device_mesh("cpu", shape)
    rows = of_hidden
    placements = [of_hidden, of_weight, of_weight] * 2 + [rows, rows]
    given = [distribute_tensor(x, mesh, p) for x, p in zip(inputs(), placements)]
    leaves = [x.requires_grad_() for x in given[:3]]
    if plain_ids:
        given[6:] = inputs()[6:]
    outputs, gradients = outputs_and_gradients(name, given, leaves)
    kinds = {isinstance(x, DTensor) for x in outputs}
    assert kinds == {not plain_ids}
    assert plain_ids or all(x.placements == tuple(rows) for x in outputs)
    assert [g.placements for g in gradients] == [x.placements for x in leaves]
    if not plain_ids:
        outputs = [x.full_tensor() for x in outputs]
    return outputs, [g.full_tensor() for g in gradients]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["stats", "kl", "jsd", "reverse kl"])
def test_heads_of_dtensors_give_what_the_whole_head_gives(ranks, name, layout):
    given = list(inputs())
    leaves = [x.requires_grad_() for x in given[:3]]
    expected = outputs_and_gradients(name, given, leaves)
    for found in ranks(of_dtensors, name, layout, False, n=4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["replicas", "vocabulary"])
def test_plain_token_ids_give_plain_outputs(ranks, layout):
    given = list(inputs())
    leaves = [x.requires_grad_() for x in given[:3]]
    expected = outputs_and_gradients("kl", given, leaves)
    for found in ranks(of_dtensors, "kl", layout, True, n=4):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def refused(group, kind):
    hidden, weight, bias, ref_hidden, ref_weight, _, ids, mask = inputs()
    line, square = (dist.init_device_mesh("cpu", shape) for shape in ((4,), (2, 2)))

    def on(x, *placements, mesh=line):
        return distribute_tensor(x, mesh, placements)

    stats, kl = kl_kernels.linear_token_stats, kl_kernels.linear_token_kl
    replicated, sharded = on(hidden, Replicate()), on(weight, Shard(0))
    ref_sharded, whole = on(ref_weight, Shard(0)), (replicated, sharded)
    on_square = on(weight, Replicate(), Shard(0), mesh=square)
    cases = {
        "group": lambda: stats(hidden, sharded, ids, group=group),
        "ids": lambda: stats(hidden, sharded, on(ids, Replicate())),
        "mask": lambda: stats(hidden, weight, ids, mask=on(mask, Replicate())),
        "plain reference": lambda: kl(*whole, ref_hidden, ref_sharded, ids),
        "reference": lambda: kl(hidden, weight, on(ref_hidden, Replicate()), ref_weight, ids),
        "other rows": lambda: kl(
            *whole, on(ref_hidden, Replicate()), on(ref_weight[1:], Shard(0)), ids
        ),
        "plain weight": lambda: stats(replicated, weight, ids),
        "plain bias": lambda: stats(*whole, ids, bias=bias),
        "meshes": lambda: stats(replicated, on_square, ids),
        "width": lambda: stats(replicated, on(weight, Shard(1)), ids),
        "width of hidden": lambda: stats(on(hidden, Shard(2)), on(weight, Replicate()), ids),
        "both": lambda: stats(on(hidden, Shard(0)), on(weight, Shard(0)), ids),
        "partial": lambda: stats(hidden, DTensor.from_local(weight, line, [Partial()]), ids),
        "few": lambda: stats(replicated, on(weight[:5], Shard(0)), ids % 5),
        "trained reference": lambda: kl(
            hidden, weight, ref_hidden, ref_sharded.requires_grad_(), ids
        ),
    }
    cases[kind]()


REFUSALS = {
    "group": (ValueError, "group and vocab_start are for plain tensors, but weight is a DTensor"),
    "ids": (TypeError, r"token_ids is a DTensor, but hidden is a plain tensor.*to_local\(\)"),
    "mask": (TypeError, r"mask is a DTensor, but hidden is a plain tensor"),
    "plain reference": (TypeError, "ref_hidden is a Tensor, but hidden is a DTensor"),
    "reference": (TypeError, "ref_hidden is a DTensor, but hidden is a plain tensor"),
    "other rows": (ValueError, r"ref_weight has shape \(21, 7\), weight \(22, 5\)"),
    "plain weight": (TypeError, "weight is a Tensor, but hidden is a DTensor.*distribute_tensor"),
    "plain bias": (TypeError, "bias is a Tensor, but hidden is a DTensor"),
    "meshes": (ValueError, "weight is on .*, hidden on .*; they must be on one mesh"),
    "width": (ValueError, "accepted on each mesh dimension: weight Replicate and hidden"),
    "width of hidden": (ValueError, "accepted on each mesh dimension: weight Replicate and hidden"),
    "both": (ValueError, r"hidden has placements .* and weight .*or pass hidden.to_local\(\)"),
    "partial": (ValueError, "weight has placements .*; accepted: Replicate and Shard"),
    "few": (ValueError, "hidden has a vocabulary of 5 over 4 ranks"),
    "trained reference": (ValueError, "ref_weight requires grad, but the reference is a constant"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_other_dtensors_are_refused_by_name_on_every_rank(ranks, kind):
    error, message = REFUSALS[kind]
    with pytest.raises(error, match=message) as found:
        ranks(refused, kind, n=4)
    assert None not in found.value.errors


def float16_gradient(group, scale):
    """A gradient whose sum over ranks overflows float16, and whose mean does not."""
    mesh = dist.init_device_mesh("cpu", (4,))
    weight = distribute_tensor(torch.zeros(4, 2, dtype=torch.float16), mesh, [Shard(0)])
    weight.requires_grad_()
    ids = torch.zeros(1, 1, dtype=torch.long)
    hidden = torch.ones(1, 1, 2, dtype=torch.float16)
    kl_kernels.linear_token_stats(hidden, weight, ids).logprob.sum().mul(scale).backward()
    return weight.grad.full_tensor()


def test_a_mean_of_float16_gradients_is_not_lost_to_their_sum(ranks):
    scale = 4e4
    expected = scale * (torch.tensor([1.0, 0, 0, 0]) - 0.25)[:, None].expand(4, 2)
    for grad in ranks(float16_gradient, scale, n=4):
        torch.testing.assert_close(grad.float(), expected)
