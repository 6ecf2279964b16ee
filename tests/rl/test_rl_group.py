"""A process group of one: what is gathered is what was given.

Several processes: `test_rl_ranks.py`.
"""

import pytest
import torch
import torch.distributed as dist

from kl_kernels import (
    AdaptiveKLController,
    FixedKLController,
    KLEarlyStop,
    masked_mean,
    masked_var,
    masked_whiten,
)

MASK = torch.tensor([[1, 0, 1], [1, 1, 1], [0, 0, 0]])
X = torch.arange(9.0).view(3, 3).square()


@pytest.fixture(scope="module")
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "statistic",
    [
        masked_mean,
        lambda x, mask, **group: masked_mean(x, mask, 1, **group),
        masked_var,
        masked_whiten,
        lambda x, mask, **group: masked_whiten(x, mask, shift_mean=False, **group),
    ],
)
@pytest.mark.parametrize("mask", [MASK, MASK * 0, torch.eye(3) * torch.tensor([0, 1, 0])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics(group, statistic, mask, dtype):
    x = X.to(dtype)
    alone, found = statistic(x, mask), statistic(x, mask, group=group)
    assert found.dtype == alone.dtype
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit", ["sequence_sum", "token_mean"])
def test_controllers(group, unit):
    for make in (
        lambda: FixedKLController(0.1, unit=unit),
        lambda: AdaptiveKLController(0.1, 6.0, 100, unit=unit),
    ):
        alone, found = make(), make()
        assert found.update(X, 3, mask=MASK, group=group) == alone.update(X, 3, mask=MASK)


def test_early_stop(group):
    mean = X[MASK.bool()].mean().item()
    for target in (mean * 0.99, mean * 1.01):
        rule = KLEarlyStop(target, tolerance=1.0)
        assert rule.before_step(X, MASK, group=group) == (mean > target)
