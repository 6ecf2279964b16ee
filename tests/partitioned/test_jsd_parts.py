"""The Jensen-Shannon divergence of a linear head, and of a vocabulary over ranks."""

import math

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import kl_kernels

BACKENDS = ("reference", "cpu", "triton")
V, D, REF_D = 203, 10, 7
SMALL = 12_000  # bytes: tiles of some rows and columns
CUTS = {2: (0, 102, 203), 4: (0, 1, 40, 160, 203)}


def heads(shape=(2, 5), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(*size, generator=g).to(dtype)

    leaves = [t.requires_grad_() for t in (normal(*shape, D), normal(V, D), normal(V))]
    return leaves, (normal(*shape, REF_D), normal(V, REF_D), normal(V))


SCALED = {
    "temperature": 0.8,
    "ref_temperature": 1.2,
    "softcap": 3.0,
    "logit_scale": 1.7,
    "ref_logit_scale": 0.6,
}


def by_the_book(leaves, ref, beta, scaled):
    """Compute the JSD in float64, from full logits."""
    logits, ref_logits = (
        hidden.double() @ weight.double().T + bias.double()
        for hidden, weight, bias in (leaves, ref)
    )
    if scaled:
        logits = 3.0 * torch.tanh(1.7 * logits / 3.0) / 0.8
        ref_logits = 0.6 * ref_logits / 1.2
    p, q = logits.softmax(-1), ref_logits.softmax(-1)
    m = (1 - beta) * p + beta * q
    return (beta * q * (q / m).log() + (1 - beta) * p * (p / m).log()).sum(-1)


def linear(leaves, ref, **options):
    (hidden, weight, bias), (ref_hidden, ref_weight, ref_bias) = leaves, ref
    return kl_kernels.linear_token_jsd(
        hidden, weight, ref_hidden, ref_weight, bias=bias, ref_bias=ref_bias, **options
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_head_gives_what_its_logits_give(scaled, beta, backend):
    leaves, ref = heads()
    expected = by_the_book(leaves, ref, beta if 0 < beta < 1 else 0.5, scaled)
    if beta in (0, 1):
        options = SCALED if scaled else {}
        ids = torch.zeros(2, 5, dtype=torch.long)
        kl = kl_kernels.linear_token_kl(
            *(leaves[0], leaves[1], ref[0], ref[1], ids), bias=leaves[2], ref_bias=ref[2], **options
        )
        expected = (kl.kl if beta else kl.forward_kl).double()
    upstream = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    got = linear(
        leaves, ref, beta=beta, memory_budget=SMALL, backend=backend, **(SCALED if scaled else {})
    )
    torch.testing.assert_close(got.double(), expected, rtol=5e-6, atol=5e-6)
    grads = torch.autograd.grad((upstream * got).sum(), leaves)
    true = torch.autograd.grad((upstream * expected).sum(), leaves)
    for grad, true_grad in zip(grads, true):
        assert (grad - true_grad).abs().max() <= 2e-5 * true_grad.abs().max()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_tiles_and_masks_change_rounding_only(backend):
    leaves, ref = heads(dtype=torch.bfloat16)
    mask = torch.tensor([[True, False, True, True, False], [False, True, True, True, True]])
    whole = linear(leaves, ref, backend=backend)
    for budget in (3000, SMALL, 1 << 20):
        got = linear(leaves, ref, mask=mask, memory_budget=budget, backend=backend)
        torch.testing.assert_close(got, whole.masked_fill(~mask, 0.0), rtol=2e-6, atol=1e-6)
    leaves[0].data[~mask] = math.nan
    got = linear(leaves, ref, mask=mask, memory_budget=SMALL, backend=backend)
    assert torch.equal(got[~mask], torch.zeros(3))
    grads = torch.autograd.grad(got.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][~mask].any()
    none = linear(leaves, ref, mask=torch.zeros(2, 5), backend=backend)
    assert not none.any()
    assert not torch.autograd.grad(none.sum(), leaves)[1].any()


def test_gradcheck_in_float64():
    leaves, ref = heads(shape=(3,), dtype=torch.float64)
    few = [leaves[0], *(t[:6].detach().requires_grad_() for t in leaves[1:])]
    ref = [ref[0], *(t[:6] for t in ref[1:])]
    assert torch.autograd.gradcheck(
        lambda *t: linear(t, ref, beta=0.3, memory_budget=1000, **SCALED), few
    )


def test_bad_arguments_of_heads_are_named():
    leaves, ref = heads()
    with pytest.raises(ValueError, match=r"beta is 2; accepted: 0 to 1"):
        linear(leaves, ref, beta=2)
    with pytest.raises(ValueError, match="ref_weight has 202 rows, weight 203"):
        linear(leaves, (ref[0], ref[1][:-1], ref[2][:-1]))
    with pytest.raises(ValueError, match="mask has shape"):
        linear(leaves, ref, mask=torch.ones(3))


def test_second_derivatives_of_a_head_are_refused():
    leaves, ref = heads()
    grad = torch.autograd.grad(linear(leaves, ref).sum(), leaves[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


# Ranks.


def rows():
    g = torch.Generator().manual_seed(0)
    x, y = (3 * torch.randn(2, 3, V, generator=g) for _ in range(2))
    x[0, 0, :150], y[0, 1, 60:] = -math.inf, -math.inf  # shards that hold nothing of a row
    x[1, 1, 7] = math.nan
    x[1, 2] = math.nan  # and masked
    return x, y, torch.tensor([[True, True, True], [True, True, False]])


def sharded(group, beta, backend):
    x, y, mask = rows()
    rank = dist.get_rank(group)
    here = slice(*CUTS[dist.get_world_size(group)][rank : rank + 2])
    logits = x[..., here].clone().requires_grad_()
    jsd = kl_kernels.token_jsd(
        logits,
        y[..., here],
        beta=beta,
        mask=mask,
        group=group,
        vocab_start=here.start,
        backend=backend,
    )
    return jsd.detach(), torch.autograd.grad(jsd.sum(), logits)[0]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("beta", [0.3, 1.0])
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_shards_give_what_the_whole_vocabulary_gives(ranks, n_ranks, beta, backend):
    x, y, mask = rows()
    x = x.requires_grad_()
    expected = kl_kernels.token_jsd(x, y, beta=beta, mask=mask, backend=backend)
    expected_grad = torch.autograd.grad(expected.sum(), x)[0]
    found = ranks(sharded, beta, backend, n=n_ranks)
    for jsd, _ in found:
        torch.testing.assert_close(jsd, found[0][0], rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(jsd, expected.detach(), rtol=5e-6, atol=1e-6, equal_nan=True)
    grad = torch.cat([grad for _, grad in found], -1)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6, equal_nan=True)


def sharded_head(group, backend):
    leaves, ref = heads()
    rank = dist.get_rank(group)
    here = slice(*CUTS[dist.get_world_size(group)][rank : rank + 2])
    mine = [leaves[0], *(t[here].detach().requires_grad_() for t in leaves[1:])]
    jsd = linear(
        mine,
        [ref[0], *(t[here] for t in ref[1:])],
        beta=0.3,
        memory_budget=SMALL,
        group=group,
        vocab_start=here.start,
        backend=backend,
    )
    return jsd.detach(), torch.autograd.grad(jsd.sum(), mine)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_heads_may_be_sharded(ranks, backend):
    leaves, ref = heads()
    expected = linear(leaves, ref, beta=0.3, backend=backend)
    hidden, *columns = torch.autograd.grad(expected.sum(), leaves)
    found = ranks(sharded_head, backend, n=2)
    for jsd, grads in found:
        assert torch.equal(jsd, found[0][0])
        torch.testing.assert_close(jsd, expected.detach(), rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(grads[0], hidden, rtol=1e-5, atol=1e-6)
    for i, true in enumerate(columns, 1):
        torch.testing.assert_close(
            torch.cat([grads[i] for _, grads in found]), true, rtol=1e-5, atol=1e-6
        )


def dtensors(group, over_rows):
    """The divergence of DTensors sharded over the vocabulary or over rows, as local tensors."""
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh.from_group(group, "cpu")
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(2, 3, 21, generator=g) for _ in range(2))
    placement = [Shard(0 if over_rows else 2)]
    logits = distribute_tensor(x, mesh, placement).requires_grad_()
    jsd = kl_kernels.token_jsd(logits, distribute_tensor(y, mesh, placement), beta=0.3)
    assert isinstance(jsd, DTensor)
    assert jsd.placements == (Shard(0) if over_rows else Replicate(),)
    jsd.to_local().sum().backward()
    whole = x.requires_grad_()
    expected = kl_kernels.token_jsd(whole, y, beta=0.3)
    expected.sum().backward()
    return jsd.full_tensor().detach(), expected.detach(), logits.grad.full_tensor(), whole.grad


@pytest.mark.parametrize("over_rows", [False, True])
def test_logits_may_be_dtensors(ranks, over_rows):
    for jsd, expected, grad, expected_grad in ranks(dtensors, over_rows, n=2):
        torch.testing.assert_close(jsd, expected, rtol=5e-6, atol=1e-6)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_part_that_is_everything_has_the_sums_of_the_row(backend):
    """Sums are float32 for any logits, with a softcap for either model; 0 where masked."""
    g = torch.Generator().manual_seed(0)
    x, y = (4 * torch.randn(2, 2, 3, 41, generator=g)).bfloat16()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    x[~mask] = torch.nan
    options = 0.3, 0.7, 1.2, 9.0, 3.0  # beta, temperatures, softcaps
    jsd, mixture_kl, policy_state, ref_state = torch.ops.kl_kernels.token_jsd(
        x, y, mask, *options, False, backend
    )
    sums = torch.ops.kl_kernels.mixture_part(x, y, mask, policy_state, ref_state, *options, backend)
    assert sums.dtype == torch.float32
    assert not sums[:, ~mask].any()
    torch.testing.assert_close(sums, torch.stack([jsd, mixture_kl]), rtol=1e-5, atol=1e-6)
