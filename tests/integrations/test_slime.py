"""slime's advantage function, on lists of tensors as slime makes them."""

from argparse import Namespace

import pytest
import torch

from kl_kernels.integrations.slime import advantages

ARGS = Namespace(kl_coef=0.1, gamma=0.98, lambd=0.9)


def rollout(lengths=(7, 1, 4), masked=(), seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.ones(n, dtype=torch.int) for n in lengths]
    for sample, position in masked:
        masks[sample][position] = 0
    return {
        "rewards": [1.0, -0.5, 2.0][: len(lengths)],
        "kl": [torch.rand(n, generator=generator) for n in lengths],
        "values": [torch.randn(n, generator=generator) for n in lengths],
        "loss_masks": masks,
        "response_lengths": list(lengths),
    }


def by_hand(kl, values, score):
    """GAE of one response, token by token, in float64."""
    kl, values = kl.double(), values.double()
    rewards = -ARGS.kl_coef * kl
    rewards[-1] += score
    found, after, next_value = [], 0.0, 0.0
    for reward, value in zip(rewards.flip(0), values.flip(0)):
        after = reward + ARGS.gamma * next_value - value + ARGS.gamma * ARGS.lambd * after
        next_value = value
        found.append(after)
    found = torch.stack(found[::-1])
    return found, found + values


def test_each_response_is_as_it_is_alone():
    data = rollout()
    assert advantages(ARGS, data) is None
    for i, length in enumerate(data["response_lengths"]):
        expected = by_hand(data["kl"][i], data["values"][i], data["rewards"][i])
        for name, values in zip(("advantages", "returns"), expected):
            assert data[name][i].shape == (length,)
            torch.testing.assert_close(data[name][i].double(), values, atol=1e-6, rtol=1e-5)


def test_tool_output_changes_nothing():
    """Tool output may be in the middle of a response, or after the policy's last token."""
    masked = [(0, 2), (0, 3), (0, 6), (2, 3)]
    data = rollout(masked=masked)
    for sample, position in masked:
        data["kl"][sample][position] = data["values"][sample][position] = torch.nan
    advantages(ARGS, data)
    for i in range(3):
        kept = data["loss_masks"][i].bool()
        expected = by_hand(data["kl"][i][kept], data["values"][i][kept], data["rewards"][i])
        for name, values in zip(("advantages", "returns"), expected):
            torch.testing.assert_close(data[name][i][kept].double(), values, atol=1e-6, rtol=1e-5)
            assert (data[name][i][~kept] == 0).all()


def test_a_response_without_tokens_of_the_policy():
    data = rollout(masked=[(1, 0)])
    advantages(ARGS, data)
    assert data["advantages"][1].tolist() == data["returns"][1].tolist() == [0.0]


def test_values_of_a_value_head():
    data, flat = rollout(), rollout()
    data["values"] = [values[:, None] for values in data["values"]]  # [R, 1]
    advantages(ARGS, data)
    advantages(ARGS, flat)
    assert all(map(torch.equal, data["advantages"], flat["advantages"]))


def test_a_rollout_without_a_critic_is_refused():
    data = rollout()
    del data["values"]
    with pytest.raises(ValueError, match=r'"values".*needs a critic'):
        advantages(ARGS, data)


def test_context_parallelism_is_refused():
    data = rollout()
    data["kl"][2] = data["kl"][2][:2]  # a rank's part of the response
    with pytest.raises(ValueError, match=r"sample 2 .*\(2,\).*\(4,\).*context parallelism"):
        advantages(ARGS, data)
