"""KL coefficients over several steps of a trainer whose controller clips with numpy.

verl's and OpenRLHF's adaptive controllers multiply a Python float by a numpy number: from the
second step on, the coefficient is np.float64.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kl_kernels.integrations import openrlhf, verl

KLS = (0.5, 2.0, 0.125, 9.0, 0.5, 3.0)  # by step, nats per token
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
SCORES = torch.tensor([1.0, -2.0])
TARGET, HORIZON, N_STEPS = 1.0, 16.0, 4


class Controller:
    def __init__(self, number):
        self.value, self.number = 0.25, number

    def update(self, current_kl, n_steps):
        error = np.clip(current_kl / TARGET - 1, -0.2, 0.2)
        self.value = self.number(self.value * (1 + error * N_STEPS / HORIZON))


def coefficients(rounded):
    """The value before each step, by the formula."""
    value = 0.25
    for kl in KLS:
        yield value
        error = min(max(kl / TARGET - 1, -0.2), 0.2)
        value = float(rounded(value * (1 + error * N_STEPS / HORIZON)))


def verl_step(controller, kl):
    """The rewards of verl's trainer, from log-probabilities that differ by `kl`."""
    ref = torch.full(MASK.shape, -3.0)
    at_end = torch.zeros(MASK.shape)
    at_end[0, 2], at_end[1, 0] = SCORES
    tensors = {
        "response_mask": MASK,
        "old_log_probs": ref + kl,
        "ref_log_prob": ref,
        "token_level_scores": at_end,
    }
    batch = type("Batch", (dict,), {"batch_size": (N_STEPS,)})(tensors)
    data, metrics = verl._apply_kl_penalty(SimpleNamespace(batch=batch), controller)
    assert type(metrics["actor/reward_kl_penalty_coeff"]) is float
    return data.batch["token_level_rewards"]


def openrlhf_step(controller, kl):
    rewards = openrlhf._compute_reward(
        SCORES, controller.value, torch.full(MASK.shape, kl), MASK.float()
    )
    controller.update(kl, N_STEPS)
    return rewards


STEPS = pytest.mark.parametrize("step", [verl_step, openrlhf_step])


@STEPS
@pytest.mark.parametrize("number", [np.float64, np.float32, np.array, torch.as_tensor, float])
def test_rewards_of_every_step_are_those_of_the_formula(step, number):
    controller = Controller(number)
    for kl, beta in zip(KLS, coefficients(number)):
        rewards = step(controller, kl)
        expected = -beta * kl * MASK.double()
        expected[0, 2] += SCORES[0]
        expected[1, 0] += SCORES[1]
        torch.testing.assert_close(rewards.double(), expected, atol=1e-6, rtol=1e-6)


@STEPS
@pytest.mark.parametrize("wrong", [-0.1, np.float64(-0.1), math.nan, math.inf, "0.1"])
def test_a_coefficient_that_is_none_is_refused(step, wrong):
    controller = Controller(float)
    controller.value = wrong
    with pytest.raises((TypeError, ValueError), match=r"(kl_coef|kl_ctrl\.value) is .*number"):
        step(controller, 0.5)
