"""The GPU backends' numbers: against float64 and eager, at real vocabularies, and bit by bit."""

import pytest
import torch
from test_far_logits import SIZES as SIZES_OF_FAR_LOGITS
from test_far_logits import assert_true_or_nan

import kl_kernels
from kl_kernels.lab.validate.cases import DIFFICULTIES, grid
from kl_kernels.lab.validate.errors import errors

B, T = 3, 5


def make_inputs(vocab_size, device, dtype=torch.bfloat16, seed=0):
    g = torch.Generator(device).manual_seed(seed)
    ref_logits = 3 * torch.randn(B, T, vocab_size, generator=g, device=device)
    noise = 0.3 * torch.randn(B, T, vocab_size, generator=g, device=device)
    token_ids = torch.randint(vocab_size, (B, T), generator=g, device=device)
    return (ref_logits + noise).to(dtype), ref_logits.to(dtype), token_ids


def evaluate(logits, ref_logits, token_ids, backend, mask=None):
    """The five outputs as one tensor, and the gradient of a mix of them."""
    x = logits.detach().requires_grad_()
    result = kl_kernels.token_kl(x, ref_logits, token_ids, mask=mask, backend=backend)
    total = result.kl + 2 * result.logprob + 0.5 * result.entropy - result.forward_kl
    return torch.stack(result).detach(), torch.autograd.grad(total.sum(), x)[0]


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_outputs_and_gradients_are_true(backend, device, difficulty, vocab_size):
    cases = [case for case in grid((vocab_size,)) if case.difficulty == difficulty]
    wrong = [e for case in cases for e in errors(case, backend, device) if not e.accepted]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("size", SIZES_OF_FAR_LOGITS)
def test_logits_far_from_zero_give_the_truth_or_nan(backend, device, size, vocab_size):
    for sign in (1, -1):
        assert_true_or_nan(backend, size, sign, vocab_size, device)


def test_runs_and_batches_are_bitwise_equal(backend, device, vocab_size):
    inputs = make_inputs(vocab_size, device)
    outputs, grad = evaluate(*inputs, backend)
    for _ in range(3):
        again, grad_again = evaluate(*inputs, backend)
        assert torch.equal(again, outputs)
        assert torch.equal(grad_again, grad)
    for b in range(B):
        alone, grad_alone = evaluate(*(t[b : b + 1, 1:3].clone() for t in inputs), backend)
        assert torch.equal(alone, outputs[:, b : b + 1, 1:3])
        assert torch.equal(grad_alone, grad[b : b + 1, 1:3])
    # Many rows, so that every multiprocessor has several.
    many, grad_many = evaluate(*(t.repeat(40, 2, *(1,) * (t.ndim - 2)) for t in inputs), backend)
    assert torch.equal(many, outputs.repeat(1, 40, 2))
    assert torch.equal(grad_many, grad.repeat(40, 2, 1))


def test_masked_rows_are_zero_whatever_they_hold(backend, device, vocab_size):
    logits, ref_logits, token_ids = make_inputs(vocab_size, device)
    mask = torch.ones(B, T, dtype=torch.bool, device=device)
    mask[0, 1] = mask[1, :] = False
    expected, expected_grad = evaluate(logits, ref_logits, token_ids, backend)
    hole = ~mask[..., None]
    outputs, grad = evaluate(
        logits.masked_fill(hole, torch.nan),
        ref_logits.masked_fill(hole, torch.nan),
        token_ids.masked_fill(~mask, -100),
        backend,
        mask,
    )
    assert torch.equal(outputs, torch.where(mask, expected, 0.0))
    assert torch.equal(grad, torch.where(mask[..., None], expected_grad, 0.0))


def unaligned(x):
    b, t, v = x.shape
    odd = torch.full((b * t * (v + 3) + 1,), torch.nan, dtype=x.dtype, device=x.device)
    return odd.as_strided((b, t, v), (t * (v + 3), v + 3, 1), 1).copy_(x)


VIEWS = {
    "without the last token": lambda x: x[:, :-1],
    "part of the vocabulary": lambda x: x[..., :-40],
    "later part of the vocabulary": lambda x: x[..., 3:],
    "every other token": lambda x: x[:, ::2],
    "batch and tokens exchanged": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "one row expanded": lambda x: x[:1, :1].expand(B, T, -1),
    "rows unaligned": unaligned,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_views_give_the_same_numbers(backend, device, view, dtype, vocab_size):
    """Not always bitwise: rows that are not aligned are summed in another order."""
    logits, ref_logits, token_ids = make_inputs(vocab_size, device, dtype)
    x, y = VIEWS[view](logits), VIEWS[view](ref_logits)
    ids = token_ids.resize_(x.shape[:-1]).clamp(max=x.shape[-1] - 1)
    outputs, grad = evaluate(x, y, ids, backend)
    expected, expected_grad = evaluate(x.clone(), y.clone(), ids, backend)
    torch.testing.assert_close(outputs, expected, atol=2e-6, rtol=4e-6)
    # A sum that differs in its last bit may turn a rounding to the dtype.
    size = torch.linalg.vector_norm(expected_grad.float(), dim=-1, keepdim=True)
    spacing = torch.finfo(dtype).eps * expected_grad.abs() + 2e-6 * size
    assert ((grad.float() - expected_grad.float()).abs() <= spacing).all()


@pytest.mark.parametrize("estimator", ["k1", "exact", "k2", "k3", "abs"])
@pytest.mark.parametrize("score_position", ["last_token", "after_last"])
def test_rewards_are_the_reference_backends(backend, device, estimator, score_position):
    logits, ref_logits, token_ids = make_inputs(1025, device, torch.float32)
    mask = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]], device=device).bool()
    scores = torch.tensor([1.5, -2.0, 100.0], device=device)
    got, expected = (
        kl_kernels.kl_rewards(
            logits, ref_logits, token_ids, scores, mask, kl_coef=0.3, kl_estimator=estimator,
            score_position=score_position, score_clip=1.75, kl_clip=1.0, biased=True, backend=name,
        )
        for name in (backend, "reference")
    )  # fmt: skip
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=4e-6, rtol=4e-6)


@pytest.mark.parametrize("skip_masked", [True, False])
@pytest.mark.parametrize("n_tokens", [1, 31, 513, 4000])
def test_advantages_are_the_reference_backends(backend, device, skip_masked, n_tokens):
    g = torch.Generator(device).manual_seed(n_tokens)
    rewards, values = torch.randn(2, 7, n_tokens, generator=g, device=device)
    mask = torch.rand(7, n_tokens, generator=g, device=device) < 0.6
    rewards[~mask], values[~mask] = torch.nan, torch.inf
    got, expected = (
        torch.ops.kl_kernels.gae(rewards, values, mask, 0.99, 0.95, skip_masked, None, name)
        for name in (backend, "reference")
    )
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)
    bounds = torch.tensor([0, 0, n_tokens // 3, n_tokens, 7 * n_tokens], device=device)
    got, expected = (
        kl_kernels.compute_gae(
            *(t.flatten() for t in (rewards, values, mask)),
            masked="skip" if skip_masked else "zero", cu_seqlens=bounds, backend=name,
        )
        for name in (backend, "reference")
    )  # fmt: skip
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


def test_compiles_as_one_graph_for_all_lengths(backend, device):
    def loss_and_stats(logits, ref_logits, token_ids, mask):
        now = kl_kernels.token_kl(
            logits * 1.0, ref_logits, token_ids, mask=mask, temperature=0.7, backend=backend
        )
        stats = kl_kernels.token_stats(logits, token_ids, mask=mask, backend=backend)
        return (now.logprob + 0.1 * now.kl + stats.entropy).sum(), *now

    torch.compiler.reset()
    compiled = torch.compile(loss_and_stats, fullgraph=True, dynamic=True)
    logits, ref_logits, token_ids = make_inputs(4096, device, torch.float32)
    for n_tokens in (5, 4, 3):
        x = logits[:, :n_tokens].clone().requires_grad_()
        others = [t[:, :n_tokens].clone() for t in (ref_logits, token_ids)]
        others.append(others[-1] % 3 != 0)
        with torch.compiler.set_stance("default" if n_tokens == 5 else "fail_on_recompile"):
            got = compiled(x, *others)
        expected = loss_and_stats(x, *others)
        grad, expected_grad = (torch.autograd.grad(r[0], x)[0] for r in (got, expected))
        for a, b in zip(got[1:], expected[1:]):
            assert torch.equal(a, b)
        torch.testing.assert_close(grad, expected_grad, atol=1e-6, rtol=1e-6)
