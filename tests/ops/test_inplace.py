"""`inplace_backward`: the gradient over the logits, equal numbers, an error for other readers."""

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import kl_kernels
from kl_kernels.lab.validate.cases import DIFFICULTIES, Case

BACKENDS = ("reference", "cpu", "triton")
V = 75


def mask_of(inputs):
    return torch.ones(inputs.token_ids.shape) if inputs.mask is None else inputs.mask


def token_kl(logits, inputs, **options):
    result = kl_kernels.token_kl(
        logits, inputs.ref_logits, inputs.token_ids, mask=inputs.mask, **options
    )
    return (result.kl - result.logprob + 0.3 * result.entropy + 0.1 * result.forward_kl).sum()


def token_stats(logits, inputs, **options):
    result = kl_kernels.token_stats(logits, inputs.token_ids, mask=inputs.mask, **options)
    return (result.logprob + 0.2 * result.entropy).sum()


def kl_rewards(logits, inputs, **options):
    result = kl_kernels.kl_rewards(
        logits,
        inputs.ref_logits,
        inputs.token_ids,
        torch.zeros(len(logits)),
        mask_of(inputs),
        kl_coef=0.1,
        **options,
    )
    return (result.kl + result.logprob).sum()


def policy_loss(logits, inputs, **options):
    loss, _ = kl_kernels.fused_policy_loss(
        logits,
        inputs.token_ids,
        None,
        torch.ones(logits.shape[:2]),
        mask_of(inputs),
        ref_logits=inputs.ref_logits,
        kl_loss_coef=0.5,
        entropy_coef=0.1,
        loss_scale=1.0,
        **options,
    )
    return loss


LOSSES = (token_kl, token_stats, kl_rewards, policy_loss)


def inputs_of(difficulty="random", dtype=torch.float32, vocab_size=V):
    return Case(difficulty, vocab_size, dtype).inputs()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_the_gradient_is_the_same_and_lies_where_the_logits_were(backend, loss, difficulty):
    inputs = inputs_of(difficulty, torch.bfloat16)
    leaf = inputs.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, inputs, backend=backend), leaf)
    logits = inputs.logits.clone().requires_grad_()
    memory = logits.data_ptr()
    (got,) = torch.autograd.grad(
        loss(logits, inputs, backend=backend, inplace_backward=True), logits
    )
    assert got.data_ptr() == memory
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_view_keeps_its_neighbours(backend, loss):
    inputs = inputs_of()
    b, t, _ = inputs.logits.shape
    whole = torch.full((b, t + 1, V + 9), 7.0)
    view = whole[:, :t, 3 : V + 3]
    view.copy_(inputs.logits)
    leaf = inputs.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, inputs, backend=backend), leaf)
    view = view.detach().requires_grad_()
    (got,) = torch.autograd.grad(loss(view, inputs, backend=backend, inplace_backward=True), view)
    assert torch.equal(got, expected)
    assert torch.equal(whole[:, :t, 3 : V + 3], expected)
    whole[:, :t, 3 : V + 3] = 7.0
    assert (whole == 7.0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
def test_whoever_saved_the_logits_is_told(backend, loss):
    inputs = inputs_of()
    leaf = inputs.logits.clone().requires_grad_()
    logits = leaf * 1.0
    other = kl_kernels.token_stats(logits, inputs.token_ids, backend=backend).entropy.sum()
    total = loss(logits, inputs, backend=backend, inplace_backward=True)
    torch.autograd.grad(total, logits, retain_graph=True)
    for gone in (other, total):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(gone, logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_share_memory_are_refused(loss):
    inputs = inputs_of()
    shared = inputs.logits[:1].expand(inputs.logits.shape)
    with pytest.raises(ValueError, match=r"inplace_backward is True, .* share memory; pass a copy"):
        loss(shared, inputs, inplace_backward=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_had_to_be_copied_are_left_alone(backend):
    inputs = inputs_of()
    strided = inputs.logits.transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    before = strided.detach().clone()
    (got,) = torch.autograd.grad(
        token_kl(strided, inputs, backend=backend, inplace_backward=True), strided
    )
    leaf = inputs.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(token_kl(leaf, inputs, backend=backend), leaf)
    assert torch.equal(got, expected)
    assert torch.equal(strided.detach(), before)


WITHOUT_A_GRADIENT = {
    "no_grad": lambda x: (torch.no_grad(), x.requires_grad_()),
    "inference_mode": lambda x: (torch.inference_mode(), x.requires_grad_()),
    "logits that do not require grad": lambda x: (torch.enable_grad(), x),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("way", WITHOUT_A_GRADIENT)
def test_logits_stay_as_they_are_where_no_gradient_is_asked_for(way, loss, backend):
    inputs = inputs_of()
    mode, logits = WITHOUT_A_GRADIENT[way](inputs.logits.clone())
    version = logits._version
    with mode:
        value = loss(logits, inputs, backend=backend, inplace_backward=True)
    assert not value.requires_grad
    assert (logits._version, torch.equal(logits.detach(), inputs.logits)) == (version, True)
    # They may be trained on afterwards.
    leaf = inputs.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, inputs, backend=backend), leaf)
    logits.requires_grad_()
    assert float(loss(logits, inputs, backend=backend).detach()) == float(value)
    (got,) = torch.autograd.grad(loss(logits, inputs, backend=backend), logits)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_compiled_call_without_a_gradient_leaves_the_logits_too(loss):
    inputs = inputs_of()
    logits = inputs.logits.clone().requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: loss(x, inputs, inplace_backward=True), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        compiled(logits)
    assert torch.equal(logits.detach(), inputs.logits)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_first_pass_of_a_reentrant_checkpoint_has_no_gradient_either(loss):
    """It runs under no_grad; the second pass, in backward, reads the same logits again."""
    inputs = inputs_of()
    leaf = inputs.logits.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(leaf, inputs), leaf)
    logits = inputs.logits.clone().requires_grad_()
    value = checkpoint(lambda x: loss(x, inputs, inplace_backward=True), logits, use_reentrant=True)
    assert torch.equal(logits.detach(), inputs.logits)
    value.backward()
    assert torch.equal(logits.grad, expected)


def sharded_without_a_gradient(group, inputs):
    width = V // dist.get_world_size(group)
    here = slice(dist.get_rank(group) * width, (dist.get_rank(group) + 1) * width)
    logits, ref_logits = inputs.logits[..., here].clone(), inputs.ref_logits[..., here]
    before, ids = logits.clone(), inputs.token_ids
    scores, mask = torch.zeros(len(ids)), torch.ones(ids.shape)
    how = {"group": group, "inplace_backward": True}
    with torch.no_grad():
        logits.requires_grad_()
        kl_kernels.token_stats(logits, ids, **how)
        kl_kernels.token_kl(logits, ref_logits, ids, **how)
        kl_kernels.token_jsd(logits, ref_logits, **how)
        kl_kernels.kl_rewards(logits, ref_logits, ids, scores, mask, kl_coef=0.1, **how)
    return torch.equal(logits.detach(), before)


def test_shards_stay_as_they_are_where_no_gradient_is_asked_for(ranks):
    assert ranks(sharded_without_a_gradient, inputs_of(), n=3) == [True] * 3
