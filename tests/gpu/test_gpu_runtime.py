"""Streams, graphs and device memory of a GPU, and arguments whose values are not checked there."""

import pytest
import torch
from test_gpu_numbers import evaluate, make_inputs

import kl_kernels
from kl_kernels.lab.validate.cases import Inputs
from kl_kernels.lab.validate.errors import gradient_error, value_error
from kl_kernels.lab.validate.truth import OUTPUTS, eager

V = 131072


def test_work_waits_for_its_own_stream_and_no_other(backend):
    inputs = make_inputs(V, "cuda")
    expected, expected_grad = evaluate(*inputs, backend)
    late = torch.full_like(inputs[0], torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: work on another stream would read NaN meanwhile
        late.copy_(inputs[0])
        outputs, grad = evaluate(late, *inputs[1:], backend)
    side.synchronize()
    assert torch.equal(outputs, expected)
    assert torch.equal(grad, expected_grad)


def test_a_captured_graph_replays_on_new_logits(backend):
    first, second = make_inputs(V, "cuda"), make_inputs(V, "cuda", seed=1)
    static = [t.clone() for t in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        evaluate(*static, backend)  # compiles, and loads modules: not possible during capture
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs, grad = evaluate(*static, backend)
    for inputs in (second, first):
        for old, new in zip(static, inputs):
            old.copy_(new)
        graph.replay()
        expected, expected_grad = evaluate(*inputs, backend)
        assert torch.equal(outputs, expected)
        assert torch.equal(grad, expected_grad)


def policy_loss(logits, ref_logits, token_ids, backend, mask=None, upstream=1.0, **options):
    """A policy loss and its gradient."""
    logits = logits.detach().requires_grad_()
    ones = torch.ones(token_ids.shape, device=logits.device)
    loss, _ = kl_kernels.fused_policy_loss(
        logits,
        token_ids,
        None,
        ones,
        ones if mask is None else mask,
        ref_logits=ref_logits,
        kl_loss_coef=0.1,
        entropy_coef=0.1,
        backend=backend,
        **options,
    )
    return loss.detach(), torch.autograd.grad(upstream * loss, logits)[0]


@pytest.mark.parametrize("upstream", [1.0, 3.0])
def test_a_captured_policy_loss_replays_on_new_logits(backend, upstream):
    first, second = make_inputs(V, "cuda"), make_inputs(V, "cuda", seed=1)
    static = [t.clone() for t in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        policy_loss(*static, backend, upstream=upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, grad = policy_loss(*static, backend, upstream=upstream)
    for inputs in (second, first):
        for old, new in zip(static, inputs):
            old.copy_(new)
        graph.replay()
        expected, expected_grad = policy_loss(*inputs, backend, upstream=upstream)
        assert torch.equal(loss, expected)
        assert torch.equal(grad, expected_grad)


def test_a_rows_policy_gradient_does_not_depend_on_the_batch(backend):
    inputs = make_inputs(V, "cuda")
    _, whole = policy_loss(*inputs, backend, denominator=7.0)
    _, again = policy_loss(*inputs, backend, denominator=7.0)
    assert torch.equal(whole, again)
    for b in range(len(whole)):
        _, alone = policy_loss(*(t[b : b + 1] for t in inputs), backend, denominator=7.0)
        assert torch.equal(alone[0], whole[b])


def test_nothing_waits_for_the_gpu(backend):
    inputs = make_inputs(V, "cuda")
    mask = torch.ones(inputs[2].shape, dtype=torch.bool, device="cuda")
    scores = torch.ones(len(mask), device="cuda")
    bounds = torch.tensor([0, 1, mask.numel()], device="cuda")

    def everything():
        evaluate(*inputs, backend, mask)
        kl_kernels.token_stats(inputs[0], inputs[2], mask=mask, backend=backend)
        shaped = kl_kernels.kl_rewards(*inputs, scores, mask, kl_coef=0.1, backend=backend)
        torch.ops.kl_kernels.gae(shaped.rewards, shaped.kl, mask, 0.99, 0.95, True, None, backend)
        logits, ref_logits, ids = (t.flatten(0, 1) for t in inputs)
        packed = mask.flatten()
        shaped = kl_kernels.kl_rewards(
            logits, ref_logits, ids, scores[:1].expand(2), packed,
            kl_coef=0.1, cu_seqlens=bounds, backend=backend,
        )  # fmt: skip
        kl_kernels.compute_gae(
            shaped.rewards, shaped.kl, packed, cu_seqlens=bounds, backend=backend
        )
        kl_kernels.importance_weights(
            shaped.logprob, shaped.ref_logprob, packed, level="sequence", cu_seqlens=bounds
        )
        kl_kernels.aggregate(shaped.kl, packed, "seq-mean-token-mean", cu_seqlens=bounds)
        kl_kernels.compute_rewards(shaped.kl, shaped.kl, packed, 0.1, cu_seqlens=bounds)
        kl_kernels.compute_gae(
            shaped.rewards, shaped.kl, packed,
            last_values=shaped.kl[:2], cu_seqlens=bounds, backend=backend,
        )  # fmt: skip
        for kind in ("grpo", "rloo", "reinforce++"):
            kl_kernels.group_advantages(shaped.kl, group_size=1, kind=kind)
            kl_kernels.group_advantages(shaped.kl, group_ids=ids, kind=kind)

        policy_loss(*inputs, backend, mask=mask, aggregation="seq-mean-token-mean")

    everything()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bad", [-1, -100, V, 10**12])
def test_a_token_out_of_range_is_nan_and_no_crash(backend, bad):
    logits, ref_logits, token_ids = make_inputs(V, "cuda")
    good, _ = evaluate(logits, ref_logits, token_ids, backend)
    token_ids[1, 2] = bad
    outputs, grad = evaluate(logits, ref_logits, token_ids, backend)
    torch.cuda.synchronize()
    here = torch.zeros(token_ids.shape, dtype=torch.bool, device="cuda")
    here[1, 2] = True
    assert torch.equal(outputs[:2].isnan().all(0), here)
    assert torch.equal(outputs[:2].isnan().any(0), here)
    assert torch.equal(outputs[:, ~here], good[:, ~here])
    # The distribution is what it is whatever the token; only the anchor may differ.
    torch.testing.assert_close(outputs[2:, here], good[2:, here], atol=2e-6, rtol=2e-6)
    assert torch.equal(grad.isnan().any(-1), here)


def test_memory_is_the_outputs_and_one_gradient(backend):
    n_rows = 1024
    logits, ref_logits = torch.randn(2, n_rows, V, device="cuda").bfloat16()
    token_ids = torch.randint(V, (n_rows,), device="cuda")
    logits.requires_grad_()
    one_percent = logits.nbytes // 100  # states of a row and its splits: tens of numbers

    def extra(call):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before

    result, for_outputs = extra(
        lambda: kl_kernels.token_kl(logits, ref_logits, token_ids, backend=backend)
    )
    assert for_outputs <= one_percent
    total = (result.kl + result.logprob + result.entropy).sum()
    _, for_gradient = extra(lambda: torch.autograd.grad(total, logits))
    assert for_gradient <= logits.nbytes + one_percent
    pair = logits[None], ref_logits[None], token_ids[None]
    _, for_loss = extra(lambda: policy_loss(*pair, backend))
    assert for_loss <= logits.nbytes + one_percent
    _, for_loss = extra(lambda: policy_loss(*pair, backend, inplace_backward=True))
    assert for_loss <= one_percent


def test_more_logits_than_32_bits_can_count(backend):
    n_rows = 2**31 // V + 16
    g = torch.Generator("cuda").manual_seed(0)
    logits, ref_logits = (
        torch.randn(1, n_rows, V, generator=g, device="cuda", dtype=torch.bfloat16)
        for _ in range(2)
    )
    token_ids = torch.randint(V, (1, n_rows), generator=g, device="cuda")
    x = logits.requires_grad_()
    result = kl_kernels.token_kl(x, ref_logits, token_ids, backend=backend)
    (grad,) = torch.autograd.grad((result.kl + result.logprob).sum(), x)
    rows = torch.tensor([0, 1, n_rows // 2, n_rows - 17, n_rows - 16, n_rows - 1], device="cuda")
    few = [t.detach()[:, rows].cpu() for t in (logits, ref_logits, token_ids)]
    wide = few[0].double().requires_grad_()
    true = eager(Inputs(wide, *few[1:]), torch.float64)
    for name in OUTPUTS:
        error = value_error(name, getattr(result, name)[:, rows].detach().cpu(), true[name])
        assert error <= 2e-6, name
    (true_grad,) = torch.autograd.grad((true["kl"] + true["logprob"]).sum(), wide)
    terms = torch.full((1, len(rows)), 2.0, dtype=torch.float64)
    assert gradient_error(grad[:, rows].cpu(), true_grad, terms) <= 1e-5


def test_every_device_is_used_as_current(backend):
    """Tensors on a device that is not the current one; the same device where there is one."""
    other = torch.cuda.device_count() - 1
    inputs = make_inputs(1025, "cuda:0", torch.float32)
    expected, _ = evaluate(*inputs, backend)
    there, _ = evaluate(*(t.to(f"cuda:{other}") for t in inputs), backend)
    assert torch.cuda.current_device() == 0
    assert torch.equal(there.to("cuda:0"), expected)
