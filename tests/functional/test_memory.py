"""Memory of a call: outputs, one gradient, and nothing that stays.

Resident pages are counted, as the kernels' own allocations are no torch tensors. Logits are larger
than 32 MiB, from which on malloc gives all that is freed back at once.
"""

import gc
import re
from pathlib import Path

import pytest
import torch

import kl_kernels

T, V = 80, 131_072
LOGITS = T * V * 4  # bytes
SMALL = 3 << 20  # per-token tensors, a tile for each thread, and what allocators round up


def resident(what):  # "VmRSS" now, "VmHWM" at most since it was reset
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) << 10


def peak(call):
    """Bytes that `call` took at most, beyond what was there."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


@pytest.fixture(scope="module")
def models():
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn((1, T, V), generator=g) for _ in range(2))
    return logits, ref_logits, torch.randint(V, (1, T), generator=g)


@pytest.fixture(autouse=True)
def _memory_that_is_not_touched_before_it_is_written(_poison_uninitialised_memory):
    torch.use_deterministic_algorithms(False)


OPS = {
    "token_stats": lambda x, ref, ids, **o: kl_kernels.token_stats(x, ids, backend="cpu", **o)[0],
    "token_kl": lambda x, ref, ids, **o: kl_kernels.token_kl(x, ref, ids, backend="cpu", **o).kl,
    "token_jsd": lambda x, ref, ids, **o: kl_kernels.token_jsd(x, ref, backend="cpu", **o),
    "kl_rewards": lambda x, ref, ids, **o: (
        kl_kernels.kl_rewards(
            x, ref, ids, torch.ones(1), torch.ones(1, T), kl_coef=0.1, backend="cpu", **o
        ).kl
    ),
    "selective_log_softmax": lambda x, ref, ids: kl_kernels.selective_log_softmax(
        x, ids[..., None].expand(-1, -1, 3), backend="cpu"
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_forward_keeps_nothing_of_the_logits_size(name, models):
    OPS[name](*models)  # lets libraries allocate their buffers
    assert peak(lambda: OPS[name](*models)) < SMALL


@pytest.mark.parametrize("name", OPS)
def test_backward_takes_one_gradient(name, models):
    x = models[0].clone().requires_grad_()
    value = OPS[name](x, *models[1:]).sum()
    assert LOGITS <= peak(value.backward) + SMALL < LOGITS + 2 * SMALL


@pytest.mark.parametrize("name", [name for name in OPS if name != "selective_log_softmax"])
def test_inplace_backward_takes_nothing(name, models):
    leaf = models[0].clone().requires_grad_()
    x = leaf * 1
    value = OPS[name](x, *models[1:], inplace_backward=True).sum()
    assert peak(lambda: torch.autograd.grad(value, x)) < SMALL


def test_a_fused_loss_takes_one_gradient_in_all(models):
    x = models[0].clone().requires_grad_()
    ones = torch.ones(1, T)

    def step():
        loss, _ = kl_kernels.fused_policy_loss(
            x, models[2], -ones, ones, ones, ref_logits=models[1], kl_loss_coef=0.1, backend="cpu"
        )
        loss.backward()

    assert LOGITS <= peak(step) + SMALL < LOGITS + 2 * SMALL


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("grad_mode", [False, True])
def test_a_fused_loss_takes_nothing_where_no_gradient_is_asked_for(
    grad_mode, inplace_backward, models
):
    """The gradient is not needed under no_grad, nor for logits that do not require grad."""
    x = models[0].clone().requires_grad_(not grad_mode)
    ones = torch.ones(1, T)

    def step():
        with torch.set_grad_enabled(grad_mode):
            kl_kernels.fused_policy_loss(
                x,
                models[2],
                -ones,
                ones,
                ones,
                ref_logits=models[1],
                kl_loss_coef=0.1,
                inplace_backward=inplace_backward,
                backend="cpu",
            )

    step()  # lets libraries allocate their buffers
    assert peak(step) < SMALL
    assert torch.equal(x.detach(), models[0])


def test_a_linear_head_takes_what_it_was_allowed(models):
    hidden, weight = torch.randn(1, T, 8), torch.randn(V, 8)
    budget = 8 << 20

    def step():
        kl_kernels.linear_token_kl(
            hidden, weight, hidden, weight * 0.5, models[2], memory_budget=budget, backend="cpu"
        )

    step()  # lets the library of matrix products allocate its buffers
    assert peak(step) < budget + weight.nbytes + SMALL < LOGITS


def test_views_are_not_copied(models):
    logits, ref_logits, ids = models

    def call():
        kl_kernels.token_kl(logits[:, 1:, :-1], ref_logits[:, :-1, 1:], ids[:, 1:] % 9)

    assert peak(call) < SMALL


LAYOUTS = {
    "vocabulary strided": lambda: torch.randn(2, 7, 3).transpose(1, 2),
    "every other logit": lambda: torch.randn(2, 3, 14)[..., ::2],
    "leading dimensions exchanged": lambda: torch.randn(4, 2, 3, 7).transpose(0, 1),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_told_of(name):
    logits = LAYOUTS[name]()
    ids = torch.zeros(logits.shape[:-1], dtype=torch.long)
    with pytest.warns(UserWarning, match=r"^logits of shape .* are copied, .* MiB") as told:
        kl_kernels.token_stats(logits, ids)
    assert told[0].filename == __file__
    ref_logits, plain = logits, logits.contiguous()
    with pytest.warns(UserWarning, match=r"^ref_logits of shape") as told:
        kl_kernels.token_jsd(plain, ref_logits)
    assert told[0].filename == __file__


def test_a_copy_is_announced_only_where_one_is_made():
    x = torch.randn(2, 3, 4, 7)
    for logits in (x, x[:, :, :-1], x[:, :1], x[..., 1:], x[:1].transpose(0, 1), x[..., :1]):
        rows = kl_kernels.functional.arguments.as_rows(logits)
        is_view = rows.data_ptr() == logits.data_ptr() and rows.stride(-1) == 1
        assert is_view == (not kl_kernels.functional.arguments._are_copied(logits))


def test_memory_does_not_grow_over_ten_thousand_calls():
    """One gradient of [B, T, V] left behind in each call would be 10 MB.

    Allocators take up to 1 MB more after the first thousands of calls, and then no more.
    """
    g = torch.Generator().manual_seed(0)
    logits, ref_logits = (torch.randn((2, 3, 40), generator=g) for _ in range(2))
    ids, mask = torch.randint(40, (2, 3), generator=g), torch.ones(2, 3)
    logits.requires_grad_()

    def call(n):
        for i in range(n):
            if i % 4 == 0:
                value = kl_kernels.token_stats(logits, ids).logprob.sum()
            elif i % 4 == 1:
                value = kl_kernels.token_kl(logits, ref_logits, ids).kl.sum()
            elif i % 4 == 2:
                value = kl_kernels.token_jsd(logits, ref_logits).sum()
            else:
                value, _ = kl_kernels.fused_policy_loss(logits, ids, -mask, mask, mask)
            torch.autograd.grad(value, logits)
        gc.collect()
        return resident("VmRSS")

    before = call(2000)
    assert call(10_000) - before < 4 << 20
