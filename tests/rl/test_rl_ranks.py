"""Statistics of a batch spread over ranks are those of the batch in one place, float64."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kl_kernels import AdaptiveKLController, FixedKLController, masked_mean, masked_var
from kl_kernels import masked_whiten as whiten

# Rows of each rank; the third rank has a row without tokens, and the fourth has no row.
ROWS = [slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 5)]
MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0]])

FUNCTIONS = {
    "mean": masked_mean,
    "mean over a dimension": lambda x, mask, **group: masked_mean(x, mask, 0, **group),
    "var": masked_var,
    "biased var": lambda x, mask, **group: masked_var(x, mask, unbiased=False, **group),
    "whiten": whiten,
    "whiten keeping the mean": lambda x, mask, **group: whiten(x, mask, shift_mean=False, **group),
}


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(offset=0.0):
    x = offset + normal(*MASK.shape)
    return x.masked_fill(MASK == 0, torch.nan), normal(*MASK.shape, seed=1)


def statistics(group, names, offset, dtype):
    x, weights = batch(offset)
    here = ROWS[dist.get_rank(group)]
    found = {}
    for name in names:
        own = x[here].to(dtype).requires_grad_()
        value = FUNCTIONS[name](own, MASK[here], group=group)
        loss = value.sum() if "whiten" not in name else (value * weights[here]).sum()
        found[name] = value.detach(), torch.autograd.grad(loss, own)[0]
    return found


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_values_are_those_of_the_whole_and_gradients_of_all_losses(ranks, offset):
    """At an offset of 1e7 E[x^2] - E[x]^2 keeps three digits of the variance, deviations nine."""
    found = ranks(statistics, tuple(FUNCTIONS), offset, torch.float64, n=4)
    close = {"rtol": 1e-8 if offset else 1e-12, "atol": 1e-8 if offset else 1e-12}
    for name, function in FUNCTIONS.items():
        x, weights = batch(offset)
        x = x.requires_grad_()
        whole = function(x, MASK)
        values, grads = zip(*(of_rank[name] for of_rank in found))
        if "whiten" in name:
            loss = (whole * weights).sum()
            torch.testing.assert_close(torch.cat(values), whole.detach(), **close)
        else:
            loss = len(ROWS) * whole.sum()
            for value in values:
                assert torch.equal(value, values[0])
                torch.testing.assert_close(value, whole.detach(), **close)
        torch.testing.assert_close(torch.cat(grads), torch.autograd.grad(loss, x)[0], **close)


def test_float32_and_integers_give_float32(ranks):
    for of_rank in ranks(statistics, tuple(FUNCTIONS), 0.0, torch.float32, n=2):
        assert {value.dtype for value, _ in of_rank.values()} == {torch.float32}


def nothing(group):
    x, mask = torch.full((2, 3), torch.nan), torch.zeros(2, 3)
    return [function(x, mask, group=group) for function in FUNCTIONS.values()]


def test_no_rank_with_a_position_gives_zero(ranks):
    for values in ranks(nothing, n=2):
        assert all((value == 0).all() for value in values)


def under_ddp(group):
    torch.manual_seed(0)
    module = torch.nn.Linear(3, 1, dtype=torch.float64)
    inputs, mask = normal(4, 3, seed=2), torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    alone = torch.autograd.grad(loss_of(module(inputs), mask), module.parameters())
    here = slice(0, 3) if dist.get_rank(group) == 0 else slice(3, 4)
    ddp = DistributedDataParallel(module, process_group=group)
    loss_of(ddp(inputs[here]), mask[here], group=group).backward()
    return [(p.grad, expected) for p, expected in zip(module.parameters(), alone)]


def loss_of(x, mask, **group):
    return masked_mean(x, mask, **group) ** 2 + masked_var(x, mask, **group)


def test_under_ddp_gradients_are_those_of_one_process(ranks):
    for pairs in ranks(under_ddp, n=2):
        for grad, expected in pairs:
            torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


KL = torch.tensor([[1.0, 2.0, torch.nan], [4.0, torch.nan, torch.nan], [torch.nan] * 3])
KL_MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])


def controlled(group, unit, kl):
    """Rank 0 has the first sequence, rank 1 the others; of four, the last two have none."""
    here = [slice(0, 1), slice(1, 3), slice(3, 3), slice(3, 3)][dist.get_rank(group)]
    adaptive = AdaptiveKLController(0.2, 3.0, 100, unit=unit)
    fixed = FixedKLController(0.1, unit=unit)
    return [
        controller.update(kl[here], 3, mask=KL_MASK[here], group=group)
        for controller in (adaptive, fixed)
    ]


@pytest.mark.parametrize("unit", ["sequence_sum", "token_mean"])
def test_controllers_of_all_ranks_see_the_whole_batch(ranks, unit):
    expected = [
        controller.update(KL, 3, mask=KL_MASK)
        for controller in (
            AdaptiveKLController(0.2, 3.0, 100, unit=unit),
            FixedKLController(0.1, unit=unit),
        )
    ]
    assert expected[0].error != 0
    assert ranks(controlled, unit, KL, n=4) == [expected] * 4


def test_nan_on_one_rank_is_applied_on_none(ranks):
    kl = torch.where(KL == 4, torch.nan, KL)
    for updates in ranks(controlled, "token_mean", kl, n=2):
        assert not any(update.applied for update in updates)


def test_a_number_for_a_group_is_refused():
    with pytest.raises(ValueError, match="group is given, but kl is a single number"):
        FixedKLController(0.1).update(3.0, 1, group=object())
