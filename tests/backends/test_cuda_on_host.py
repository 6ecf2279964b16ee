"""The CUDA kernels on host threads: the very csrc/cuda/*.cuh, with small blocks and parts.

Against float64 on every hard input, like the other backends; and under AddressSanitizer,
UndefinedBehaviorSanitizer and ThreadSanitizer. A block is 64 threads of 8 logits (two warps), a
part 2048 logits at most. Sizes: one logit; too few for a thread to own 8; two parts, of which the
first has an odd number of tiles and the second a piece of one and a tail.
"""

import itertools
import math
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
from host.cuda_on_host import backend, compile_host, library
from operators import arguments
from test_far_gradients import DISTANCES as DISTANCES_OF_FAR_LOGITS
from test_far_gradients import KINDS as KINDS_OF_FAR_LOGITS
from test_far_gradients import assert_true_of_float32_states
from test_far_logits import SIZES as SIZES_OF_FAR_LOGITS
from test_far_logits import assert_true_or_nan
from test_ruled_out import OPTIONS as LOSSES
from test_ruled_out import assert_policy_losses_are_right, assert_rewards_are_right

import kl_kernels
from kl_kernels.backends import dispatch, reference
from kl_kernels.lab.validate.cases import DIFFICULTIES, Inputs, grid
from kl_kernels.lab.validate.errors import VALUE_BUDGET, errors, value_error
from kl_kernels.lab.validate.report.gate import breaches
from kl_kernels.lab.validate.report.grid import QUICK
from kl_kernels.lab.validate.report.measure import EAGERS, fused, measure
from kl_kernels.lab.validate.truth import eager
from kl_kernels.schemas import GAEArgs

NAME = "cuda_on_host"
SIZES = (1, 7, 2601)
# (-O0 compiles fast; ThreadSanitizer's program takes longer to run than to compile.)
SANITIZERS = {
    "address": ("-O0", "-fsanitize=address,undefined"),
    "thread": ("-O1", "-fsanitize=thread"),
}


@pytest.fixture(scope="module")
def binaries():
    """The two sanitized programs, compiled beside the library."""
    with ThreadPoolExecutor() as pool:
        pool.submit(library)
        programs = {
            name: pool.submit(
                compile_host,
                "sanitized.cpp",
                "-g",
                *flags,
                "-fno-sanitize-recover=all",
            )
            for name, flags in SANITIZERS.items()
        }
        return {name: program.result() for name, program in programs.items()}


@pytest.fixture(autouse=True)
def host_backend(monkeypatch):
    kernels = backend()
    monkeypatch.setitem(dispatch.BACKENDS, NAME, dispatch.Backend(lambda: kernels, lambda: None))
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_outputs_and_gradients_are_true(difficulty):
    cases = [case for case in grid(SIZES) if case.difficulty == difficulty]
    wrong = [e for case in cases for e in errors(case, NAME) if not e.accepted]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("size", SIZES_OF_FAR_LOGITS)
def test_logits_far_from_zero_give_the_truth_or_nan(size):
    for sign, vocab_size in itertools.product((1, -1), (1, 33, 2049)):
        assert_true_or_nan(NAME, size, sign, vocab_size)


@pytest.mark.parametrize("kind", KINDS_OF_FAR_LOGITS)
def test_logits_far_from_zero_have_true_gradients(kind):
    for distance in DISTANCES_OF_FAR_LOGITS:
        assert_true_of_float32_states(NAME, kind, distance)


def test_the_gate_of_the_numerics_report_holds():
    runs = {NAME: partial(fused, backend=NAME), **EAGERS}
    few = replace(
        QUICK, dtypes=("float32",), spreads=(), temperatures=(), vocab_sizes=(), most_rows=2
    )
    cells = [measure(cell, runs) for cell in few.cells()]
    assert [str(breach) for breach in breaches({"cells": cells})] == []


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_sanitizers_find_nothing(binaries, sanitizer):
    command = [str(binaries[sanitizer])]
    if sanitizer == "thread":
        # ThreadSanitizer wants its shadow memory where address randomisation may put libraries.
        command = ["setarch", platform.machine(), "-R", *command]
    # Threads that disagree about a barrier wait for each other for ever.
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "all kernels ran\n"


def random_rows(vocab_size, dtype, shape=(2, 3)):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, vocab_size, generator=g)).to(dtype)
    ref_logits = (3 * torch.randn(*shape, vocab_size, generator=g)).to(dtype)
    return logits, ref_logits, torch.randint(vocab_size, shape, generator=g)


def evaluate(logits, ref_logits, token_ids):
    logits = logits.detach().requires_grad_()
    result = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=NAME)
    loss = (result.logprob + result.kl - result.forward_kl + result.entropy).sum()
    return torch.stack(result).detach(), torch.autograd.grad(loss, logits)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_alignment_and_strides_change_nothing(dtype):
    """Bitwise: with an odd V a row's alignment depends on its place in the batch."""
    logits, ref_logits, token_ids = random_rows(2600, dtype)
    expected, expected_grad = evaluate(logits, ref_logits, token_ids)
    for shift, ref_shift in itertools.product((0, 1, 2), (0, 3)):
        views = []
        for tensor, by in ((logits, shift), (ref_logits, ref_shift)):
            wide = torch.full((3, 2, 2600 + 16), math.nan, dtype=dtype)
            view = wide[:, :, by : by + 2600].transpose(0, 1)
            view.copy_(tensor)
            views.append(view)
        got, grad = evaluate(*views, token_ids)
        assert torch.equal(got, expected), (shift, ref_shift)
        assert torch.equal(grad, expected_grad), (shift, ref_shift)


def test_a_row_does_not_depend_on_the_others():
    """Bitwise, gradients with an odd V included: their rows are unaligned, too."""
    logits, ref_logits, token_ids = random_rows(2601, torch.bfloat16)
    together, grads = evaluate(logits, ref_logits, token_ids)
    alone, grad = evaluate(logits[1:, 1:2], ref_logits[1:, 1:2], token_ids[1:, 1:2])
    assert torch.equal(alone, together[:, 1:, 1:2])
    assert torch.equal(grad, grads[1:, 1:2])


def test_expanded_rows_are_read_through_stride_zero():
    logits, ref_logits, token_ids = random_rows(70, torch.float32)
    row, ref_row = logits[:1, :1].expand(2, 3, 70), ref_logits[:1, :1].expand(2, 3, 70)
    got, grad = evaluate(row, ref_row, token_ids)
    expected, expected_grad = evaluate(row.clone(), ref_row.clone(), token_ids)
    assert torch.equal(got, expected)
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_guarded_loop_decides_by_support(dtype):
    """A divergence is infinite where a logit is, however small the weight; NaN and +inf stay."""
    logits, ref_logits, token_ids = random_rows(2601, dtype)
    logits[..., 5], ref_logits[..., 5] = -math.inf, -math.inf  # seen beforehand
    place = 1200  # not in the first tile, and no last logit
    token_ids[token_ids == place] = 0
    logits[0, 0, place], ref_logits[0, 0, place] = -math.inf, -3e4
    logits[0, 1, place], ref_logits[0, 1, place] = -3e4, -math.inf
    logits[0, 2, place], ref_logits[0, 2, place] = -math.inf, -math.inf
    logits[1, 0, place] = math.nan
    ref_logits[1, 1, place] = math.inf
    lowest = torch.finfo(dtype).min
    logits[1, 2, [5, place]], ref_logits[1, 2, [5, place]] = lowest, lowest
    token_ids[token_ids == 5] = 0
    true = eager(Inputs(logits, ref_logits, token_ids), torch.float64)
    assert true["forward_kl"][0, 0] == math.inf
    assert true["kl"][0, 1] == math.inf
    got = kl_kernels.token_kl(logits, ref_logits, token_ids, backend=NAME)
    for name, value in got._asdict().items():
        assert value_error(name, value, true[name]) <= VALUE_BUDGET, name


@pytest.mark.parametrize("token", [-1, 70, 2**40])
def test_a_token_outside_the_vocabulary_is_nan_and_reads_nothing(token):
    logits, ref_logits, token_ids = random_rows(70, torch.float32)
    expected, _ = evaluate(logits, ref_logits, token_ids)
    kernels = dispatch.choose(NAME, [logits])
    token_ids[0, 1] = token
    args = arguments("token_kl", logits=logits, ref_logits=ref_logits, token_ids=token_ids)
    got = kernels.token_kl(args)
    for name, value, true in zip(kl_kernels.TokenKL._fields, got, expected):
        if "logprob" in name:
            assert value[0, 1].isnan()
            value[0, 1] = true[0, 1]
        torch.testing.assert_close(value, true, rtol=1e-5, atol=1e-6)
    ones = torch.ones(token_ids.shape)
    grad = torch.empty_like(logits)
    backward = arguments(
        "token_stats_backward",
        grad_logprob=ones,
        grad_entropy=ones,
        logits=logits,
        token_ids=token_ids,
        policy_state=got.policy_state,
        entropy=got.entropy,
        grad_logits=grad,
    )
    kernels.token_stats_backward(backward)
    assert grad[0, 1].isnan().all()
    assert grad[0, 0].isfinite().all()
    kernels.token_stats_backward(backward._replace(grad_logprob=None))
    assert grad.isfinite().all()


@pytest.mark.parametrize("estimator", range(5))
@pytest.mark.parametrize("kl_clip", [None, 0.5])
def test_rewards(estimator, kl_clip):
    logits, ref_logits, token_ids = random_rows(70, torch.float32)
    mask = torch.tensor([[True, False, True], [False, False, False]])
    scores, score_index = torch.tensor([1.5, -2.0]), torch.tensor([1, -1])
    args = arguments(
        "kl_rewards",
        logits=logits,
        ref_logits=ref_logits,
        token_ids=token_ids,
        mask=mask,
        scores=scores,
        score_index=score_index,
        kl_coef=0.2,
        estimator=estimator,
        kl_clip=kl_clip,
        temperature=0.9,
        ref_temperature=1.1,
    )
    got = dispatch.choose(NAME, [logits]).kl_rewards(args)
    for value, true in zip(got, reference.kl_rewards(args)):
        torch.testing.assert_close(value, true, rtol=1e-5, atol=2e-6)


def test_rewards_of_tokens_that_are_ruled_out():
    assert_rewards_are_right(NAME)


@pytest.mark.parametrize("name", LOSSES)
def test_policy_losses_of_tokens_that_are_ruled_out(name):
    for sign, case in itertools.product((1.0, -1.0), ("both", "policy", "reference")):
        assert_policy_losses_are_right(NAME, name, sign, case)


@pytest.mark.parametrize("n_tokens", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("skip_masked", [True, False])
def test_gae(n_tokens, skip_masked):
    g = torch.Generator().manual_seed(n_tokens)
    rewards, values = torch.randn(2, 3, n_tokens, generator=g)
    mask = torch.rand(3, n_tokens, generator=g) < 0.7
    rewards[~mask] = math.nan
    args = GAEArgs(rewards, values, mask, 0.99, 0.95, skip_masked, None)
    for got, true in zip(dispatch.choose(NAME, [rewards]).gae(args), reference.gae(args)):
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-6)
    packed = (t.view(1, -1) for t in (rewards, values, mask))
    bounds = torch.tensor([0, 0, n_tokens // 3, n_tokens, 3 * n_tokens, 3 * n_tokens])
    args = GAEArgs(*packed, 0.99, 0.95, skip_masked, bounds)
    for got, true in zip(dispatch.choose(NAME, [rewards]).gae(args), reference.gae(args)):
        torch.testing.assert_close(got, true, rtol=1e-6, atol=1e-6)


def test_no_rows():
    logits = torch.zeros(0, 3, 70)
    result = kl_kernels.token_kl(logits, logits, torch.zeros(0, 3, dtype=torch.long), backend=NAME)
    assert result.kl.shape == (0, 3)
