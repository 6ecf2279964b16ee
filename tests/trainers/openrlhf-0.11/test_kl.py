"""`compute_approx_kl` and the rewards that are made of it."""

import pytest
import torch
from batches import KINDS, SHAPE, gradient, log_probs, log_probs_near, mask_of
from openrlhf.models import utils
from openrlhf.models.utils import compute_approx_kl as theirs
from openrlhf.models.utils import compute_reward as their_reward
from openrlhf.models.utils import masked_mean as their_mean
from openrlhf.trainer.ppo_utils import kl_controller

import kl_kernels
from kl_kernels.integrations import openrlhf

__all__ = ["log_probs"]


@pytest.fixture(autouse=True, scope="module")
def patched():
    with openrlhf.patch() as patch:
        yield patch


@pytest.mark.exercises("compute_approx_kl: every estimator, value and gradient")
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("spread", [None, 0.5, 4.0])
def test_values_and_gradients_are_openrlhfs(log_probs, estimator, unbiased, spread):
    base = log_probs_near(log_probs, 0.5, seed=1)
    # With 4 nats between them some weights are beyond OpenRLHF's bound of 10.
    old = None if spread is None else log_probs_near(log_probs, spread, seed=2)

    def penalty(function):
        return lambda x: function(x, base, old, estimator, unbiased)

    value, grad = gradient(penalty(utils.compute_approx_kl), log_probs)
    their_value, their_grad = gradient(penalty(theirs), log_probs)
    torch.testing.assert_close(value, their_value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad, their_grad, atol=1e-6, rtol=1e-5)
    assert grad.abs().mean() > 0.1


@pytest.mark.exercises("compute_approx_kl beside kl_penalty")
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_our_own_function_is_theirs(log_probs, estimator):
    base = log_probs_near(log_probs, 0.5, seed=1)
    own, own_grad = gradient(
        lambda x: kl_kernels.kl_penalty(x, base, estimator + "+", kl_clamp=10.0), log_probs
    )
    value, grad = gradient(lambda x: theirs(x, base, None, estimator, True), log_probs)
    torch.testing.assert_close(own, value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(own_grad, grad, atol=1e-6, rtol=1e-5)


FAR = [-60.0, -25.0, -11.5, -10.0, -2.7, 0.0, 3.0, 10.0, 10.5, 15.0, 25.0, 60.0]


@pytest.mark.exercises("compute_approx_kl: values far from the reference")
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_values_are_openrlhfs_at_any_distance(estimator, unbiased):
    distance = torch.tensor([FAR])
    ours, their = (
        function(distance, torch.zeros_like(distance), None, estimator, unbiased)
        for function in (utils.compute_approx_kl, theirs)
    )
    torch.testing.assert_close(ours, their)


@pytest.mark.exercises("compute_approx_kl: far from the reference the gradient stays")
@pytest.mark.parametrize(
    ("estimator", "distance", "expected"),
    [
        ("k1", 12.0, 1.0),
        ("k1", -12.0, 1.0),
        ("k2", 5.0, 5.0),
        ("k2", -7.0, -7.0),
        ("k3", -2.7, -13.88),
        ("k3", -9.0, -8102.1),
        ("k3", 12.0, 1.0),
    ],
)
def test_a_clamp_does_not_end_the_pull_back(estimator, distance, expected):
    """Theirs: gradient 0 where the KL is clamped at 10. Ours: the estimator's."""
    at, base = torch.full((1, 1), distance), torch.zeros(1, 1)
    value, grad = gradient(lambda x: utils.compute_approx_kl(x, base, None, estimator), at)
    their_value, their_grad = gradient(lambda x: theirs(x, base, None, estimator), at)
    assert value.item() == their_value.item()
    assert value.abs().item() == 10.0
    assert their_grad.item() == 0.0
    assert grad.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.exercises("compute_reward: scores, KL and clipping")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kl_coef", [0.2, 0.0, -1.0])
@pytest.mark.parametrize("reward_clip_range", [None, (-10, 10), (-0.5, 1.0)])
def test_rewards_are_openrlhfs(log_probs, kind, kl_coef, reward_clip_range):
    mask = mask_of(kind)
    # The actor multiplies both log-probabilities by the mask.
    kl = theirs(log_probs * mask, log_probs_near(log_probs, 0.5, seed=1) * mask)
    scores = torch.linspace(-2, 3, len(mask))
    args = (scores, kl_coef, kl, mask, reward_clip_range)
    expected = their_reward(*args)
    torch.testing.assert_close(utils.compute_reward(*args), expected)
    assert expected.abs().max() > 0.4
    if reward_clip_range == (-10, 10) and kl_coef > 0:
        own = kl_kernels.compute_rewards(scores, kl, mask, kl_coef, score_clip=10.0)
        torch.testing.assert_close(own, expected)


@pytest.mark.exercises("compute_reward: a response without tokens")
def test_an_empty_response_gets_no_reward(log_probs):
    """Theirs: its score in the last column, which is padding. Ours: nowhere."""
    mask = mask_of("right padding")
    mask[1] = False
    args = (torch.ones(len(mask)), 0.1, torch.zeros(SHAPE), mask)
    assert their_reward(*args)[1].tolist() == [0.0] * 8 + [1.0]
    assert utils.compute_reward(*args)[1].tolist() == [0.0] * 9
    torch.testing.assert_close(utils.compute_reward(*args)[2:], their_reward(*args)[2:])


@pytest.mark.exercises("compute_reward: NaN at masked positions")
def test_nan_where_masked_does_not_reach_a_reward(log_probs):
    """Theirs: NaN there, and so in the returns of the whole response. Ours: 0."""
    mask = mask_of("right padding")
    kl = log_probs.masked_fill(~mask, torch.nan)
    args = (torch.ones(len(mask)), 0.1, kl, mask)
    assert their_reward(*args)[~mask].isnan().all()
    assert (utils.compute_reward(*args)[~mask] == 0).all()
    torch.testing.assert_close(utils.compute_reward(*args)[mask], their_reward(*args)[mask])


@pytest.mark.exercises("masked_mean")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [None, 1, -1])
def test_means_are_openrlhfs(log_probs, kind, dim):
    mask = mask_of(kind)
    expected = their_mean(log_probs, mask.float(), dim)
    for mean in (utils.masked_mean, kl_kernels.masked_mean):
        torch.testing.assert_close(mean(log_probs, mask.float(), dim), expected)
    torch.testing.assert_close(utils.masked_mean(log_probs, None), log_probs.mean())


@pytest.mark.exercises("masked_mean: over nothing, and NaN at masked positions")
def test_a_mean_over_nothing(log_probs):
    """Theirs: NaN for both. Ours: 0, and as if there were none."""
    mask = mask_of("right padding")
    mask[1] = False
    polluted = log_probs.masked_fill(~mask, torch.nan)
    assert their_mean(log_probs, mask, dim=1)[1].isnan()
    assert their_mean(polluted, mask).isnan()
    assert utils.masked_mean(log_probs, mask, dim=1)[1] == 0
    torch.testing.assert_close(utils.masked_mean(polluted, mask), their_mean(log_probs, mask))


@pytest.mark.exercises("KL controllers: fixed and adaptive")
def test_controllers_move_as_openrlhfs_do():
    adaptive = kl_controller.AdaptiveKLController(0.01, target=6.0, horizon=10000)
    own = kl_kernels.AdaptiveKLController(0.01, target=6.0, horizon=10000, unit="token_mean")
    fixed, own_fixed = kl_controller.FixedKLController(0.01), kl_kernels.FixedKLController(0.01)
    for current in (0.0, 3.0, 6.5, 30.0, 5.9, 7.0):
        for controller in (adaptive, own, fixed, own_fixed):
            controller.update(current, 512)
        assert own.value == pytest.approx(adaptive.value, rel=1e-12)
        assert own_fixed.value == fixed.value
    assert own.value != 0.01
