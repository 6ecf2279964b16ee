"""The operators inside autograd, torch.compile and the dispatcher."""

import gc

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kl_kernels
from kl_kernels.backends.reference.rows import BLOCK_V
from kl_kernels.partitioned.operators import IMPLEMENTATIONS

BACKENDS = ("reference", "cpu", "triton")
V = 41


class Calls(TorchDispatchMode):
    """Counts the operators of this package that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "kl_kernels":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def make(dtype=torch.float32, requires_grad=True):
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 3, V, generator=g, dtype=dtype).requires_grad_(requires_grad)
    ref_logits = torch.randn(2, 3, V, generator=g, dtype=dtype)
    return logits, ref_logits, torch.randint(V, (2, 3), generator=g)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_mix_takes_one_backward_call(backend):
    result = kl_kernels.token_kl(*make(), backend=backend)
    with Calls() as calls:
        (result.kl + result.logprob + result.entropy * result.forward_kl).sum().backward()
    assert calls.names == ["token_kl_backward"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_loss_is_one_call_and_backward_scales(backend):
    logits, ref_logits, token_ids = make()
    with Calls() as calls:
        loss, _ = kl_kernels.fused_policy_loss(
            logits,
            token_ids,
            None,
            torch.ones(2, 3),
            torch.ones(2, 3),
            ref_logits=ref_logits,
            kl_loss_coef=0.1,
            backend=backend,
        )
        assert calls.names == ["policy_loss"]
        ref_logits.fill_(torch.nan)
        loss.backward()
    assert calls.names == ["policy_loss", "scale_gradient"]
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_kl_gradient_the_reference_is_not_read_again(backend):
    logits, ref_logits, token_ids = make()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    ref_logits.data.fill_(torch.nan)
    with Calls() as calls:
        (result.logprob - 0.1 * result.entropy).sum().backward()
    assert calls.names == ["token_stats_backward"]
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_are_not_read_by_backward(backend):
    logits, ref_logits, token_ids = make()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, mask=mask, backend=backend)
    logits.data[~mask] = torch.nan
    result.kl.sum().backward()
    assert torch.equal(logits.grad[~mask], torch.zeros(3, V))
    assert (logits.grad[mask] != 0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_upstream_at_masked_rows_does_not_leak(backend):
    logits, ref_logits, token_ids = make()
    mask = torch.tensor([[True, False, True], [False, False, True]])
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, mask=mask, backend=backend)
    upstream = torch.ones(2, 3).masked_fill(~mask, torch.nan)
    result.kl.backward(upstream)
    assert torch.equal(logits.grad[~mask], torch.zeros(3, V))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_upstream_gradient_never_meets_an_infinite_kl(backend):
    logits, ref_logits, token_ids = make()
    ref_logits[0, 0, 5] = -torch.inf
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    assert result.kl[0, 0] == torch.inf
    keep = result.kl.isfinite()
    torch.where(keep, result.kl, 0.0).sum().backward()
    assert torch.equal(logits.grad[0, 0], torch.zeros(V))
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradients_nothing_is_saved(backend):
    def tensors_alive():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    logits, ref_logits, token_ids = make()
    with torch.no_grad():
        result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    assert all(t.grad_fn is None for t in result)
    logits = logits.detach()
    before = tensors_alive()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    assert all(t.grad_fn is None for t in result)
    assert tensors_alive() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_can_be_used_twice_and_the_graph_kept(backend):
    logits, ref_logits, token_ids = make()
    before = logits.detach().clone()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    first = torch.autograd.grad(result.kl.sum(), logits, retain_graph=True)[0]
    second = torch.autograd.grad(result.kl.sum(), logits)[0]
    assert torch.equal(first, second)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_changed_in_place_before_backward_are_noticed(backend):
    leaf, ref_logits, token_ids = make()
    logits = leaf * 1.0
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    logits.div_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.kl.sum().backward()


def test_second_derivatives_are_refused():
    logits, ref_logits, token_ids = make()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids)
    grad = torch.autograd.grad(result.kl.sum(), logits, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.sum().backward()


def test_second_derivatives_of_a_policy_loss_are_refused():
    logits, _, token_ids = make()
    ones = torch.ones(2, 3)
    loss, _ = kl_kernels.fused_policy_loss(logits, token_ids, None, ones, ones)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss, logits, create_graph=True)


@pytest.mark.parametrize("output", ["logprob", "kl", "forward_kl", "entropy"])
def test_gradcheck_in_float64(output):
    logits, ref_logits, token_ids = make(torch.float64)
    mask = torch.tensor([[True, True, False], [True, True, True]])

    def function(x):
        result = kl_kernels.token_kl(
            x, ref_logits, token_ids, mask=mask, temperature=0.7, softcap=4.0, ref_softcap=3.0
        )
        return getattr(result, output)

    assert torch.autograd.gradcheck(function, logits)


def arguments(name, backend):
    """Arguments of each operator, backend and all."""
    logits, ref_logits, token_ids = make()
    mask = torch.tensor([[True, True, False], [True, True, True]])
    per_token = torch.rand(2, 3)
    state = torch.rand(2, 2, 3) + 1.0
    scales = (0.7, 1.1, None, 5.0)
    constants = logits.detach(), ref_logits, token_ids, mask
    gradient = torch.zeros(2, 3, V)
    parts = torch.rand(2, 9, 2, 3) + 1.0
    parts[1, [3, 8]] = torch.inf  # the first holds all tokens
    arguments = {
        "fold_part": (*constants, *scales),
        "finish_parts": (parts, torch.tensor([[0.0, 3.0], [3.0, 4.0]]), mask),
        "fold_tail": (
            *(logits.detach(), token_ids, torch.arange(3).expand(2, 3, 3), mask),
            *(0.7, None),
        ),
        "token_stats": (logits, token_ids, mask, 0.7, None, False),
        "token_kl": (logits, ref_logits, token_ids, mask, *scales, False),
        "token_jsd": (logits, ref_logits, mask, 0.3, *scales, False),
        "mixture_part": (*constants[:2], mask, state, state, 0.3, *scales),
        "token_jsd_backward": (
            *(per_token, *constants[:2], mask, state, state, per_token, 0.3, *scales),
        ),
        "kl_rewards": (
            *(logits, ref_logits, token_ids, mask),
            *(torch.rand(2), torch.tensor([1, 2]), 0.1, 0, None, *scales, False),
        ),
        "token_stats_backward": (
            *(per_token, None, logits.detach(), token_ids, mask),
            *(state, per_token, 0.7, None, False),
        ),
        "token_kl_backward": (
            *(None, per_token, None, per_token, *constants),
            *(state, state, per_token, per_token, *scales, False),
        ),
        "policy_loss": (
            *constants,
            *(None, per_token, per_token, per_token, None),
            *(0.2, 0.2, None, 20.0, 0.1, 1, 0.01, *scales, None, gradient),
        ),
        "scale_gradient": (gradient, torch.tensor(2.0)),
        "gae": (per_token, per_token, mask, 0.9, 0.95, True, None),
    }
    for backward in ("token_stats_backward", "token_kl_backward", "token_jsd_backward"):
        arguments[backward + "_"] = (*arguments[backward], gradient)
    return (*arguments[name], backend)


OPERATORS = (
    *("token_stats", "token_kl", "token_jsd", "kl_rewards"),
    *("token_stats_backward", "token_kl_backward", "token_jsd_backward"),
    *("token_stats_backward_", "token_kl_backward_", "token_jsd_backward_"),
    *(
        "fold_part",
        "fold_tail",
        "finish_parts",
        "mixture_part",
        "policy_loss",
        "scale_gradient",
        "gae",
    ),
)


def test_no_operator_is_left_out():
    """Those of heads are in tests/partitioned/test_operators.py, of kept sets in test_kept.py."""
    every = torch._C._dispatch_get_all_op_names()
    of_kept_sets = "kept_kl", "kept_kl_backward"
    assert {*OPERATORS, *IMPLEMENTATIONS, *of_kept_sets} == {
        name.removeprefix("kl_kernels::") for name in every if name.startswith("kl_kernels::")
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_are_registered_completely(name, backend):
    """Schema, fake and autograd registration agree with what the kernels do."""
    op = getattr(torch.ops.kl_kernels, name).default
    torch.library.opcheck(op, arguments(name, backend))


def kl_and_logprob(logits, ref_logits, token_ids, mask, **how):
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, mask=mask, **how)
    return (result.kl + result.logprob).sum()


def jsd(logits, ref_logits, token_ids, mask, **how):
    return kl_kernels.token_jsd(logits, ref_logits, beta=0.3, mask=mask, **how).sum()


def rewards(logits, ref_logits, token_ids, mask, **how):
    scores = torch.tensor([1.0, -2.0])
    r = kl_kernels.kl_rewards(logits, ref_logits, token_ids, scores, mask, kl_coef=0.1, **how)
    return (r.rewards * r.logprob + r.kl).sum()


def policy_loss(logits, ref_logits, token_ids, mask, **how):
    loss, metrics = kl_kernels.fused_policy_loss(
        logits,
        token_ids,
        None,
        mask.float() - 0.3,
        mask,
        ref_logits=ref_logits,
        kl_loss_coef=0.1,
        **how,
    )
    return 2.0 * loss + metrics["kl"]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("function", [kl_and_logprob, jsd, rewards, policy_loss])
def test_compiles_whole_and_once_for_all_lengths(backend, inplace_backward, function):
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()

    def loss(leaf, *args):
        logits = leaf * 1.0
        return function(logits, *args, inplace_backward=inplace_backward, backend=backend)

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for n_tokens in (3, 5, 7, 11):
        logits = torch.randn(2, n_tokens, V, requires_grad=True)
        ids = torch.randint(V, (2, n_tokens))
        ref_logits, mask = torch.randn(2, n_tokens, V), torch.rand(2, n_tokens) < 0.7
        compiled(logits, ref_logits, ids, mask).backward()
        grad, logits.grad = logits.grad, None
        loss(logits, ref_logits, ids, mask).backward()
        assert torch.equal(grad, logits.grad)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_is_saved_of_a_row_belongs_to_the_anchor_as_it_is_saved(backend):
    """In float32 an anchor of 1e4 is rounded by up to 5e-4, and every weight by as much."""
    g = torch.Generator().manual_seed(0)
    logits = (1e4 + torch.randn(5, 17, generator=g)).requires_grad_()
    token_ids = torch.randint(17, (5,), generator=g)
    kl_kernels.token_stats(logits, token_ids, backend=backend).logprob.sum().backward()
    token = torch.nn.functional.one_hot(token_ids, 17)
    expected = token - logits.detach().double().softmax(-1)
    torch.testing.assert_close(logits.grad.double(), expected, rtol=0, atol=1e-6)


def test_a_token_is_found_in_whichever_block_of_the_vocabulary_it_lies():
    """The reference takes the vocabulary in blocks; the tokens are at all their ends."""
    token_ids = torch.tensor([0, BLOCK_V - 1, BLOCK_V, BLOCK_V + 4])
    logits = torch.zeros(4, BLOCK_V + 5, dtype=torch.float64, requires_grad=True)
    kl_kernels.token_stats(logits, token_ids, backend="reference").logprob.sum().backward()
    expected = torch.full_like(logits, -1 / (BLOCK_V + 5))
    expected[torch.arange(4), token_ids] += 1
    torch.testing.assert_close(logits.grad, expected, rtol=1e-12, atol=1e-15)
