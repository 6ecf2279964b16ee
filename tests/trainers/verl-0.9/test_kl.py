"""KL: `kl_penalty` under all of its names, and the reward that it is a part of."""

from functools import partial

import pytest
import torch
from batches import KINDS, SHAPE, gradient, log_probs, log_probs_near, mask_of
from verl import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.trainer.ppo.core_algos import kl_penalty as theirs
from verl.trainer.ppo.ray_trainer import apply_kl_penalty as apply_theirs

import kl_kernels
from kl_kernels.integrations import verl

NAMES = ("k1", "kl", "abs", "k2", "mse", "k3", "low_var_kl")
__all__ = ["log_probs"]


@pytest.fixture
def patched():
    with verl.patch() as patch:
        yield patch


@pytest.mark.exercises("kl_penalty: every name, value and gradient")
@pytest.mark.parametrize("suffix", ["", "+"])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_verls(log_probs, patched, name, suffix):
    ref = log_probs_near(log_probs, 0.5, seed=1)
    for penalty in (
        lambda x: core_algos.kl_penalty(x, ref, name + suffix),
        # k1 is not taken for a loss by ours unless it is said how.
        lambda x: (
            kl_kernels.kl_penalty(
                x,
                ref,
                name + suffix,
                gradient="score_function" if name + suffix in ("k1", "kl") else "pathwise",
            )
            if name + suffix not in ("k1", "kl")
            else x - ref
        ),
    ):
        value, grad = gradient(penalty, log_probs)
        their_value, their_grad = gradient(lambda x: theirs(x, ref, name + suffix), log_probs)
        # Rounding of exp(x) - x - 1, of which expm1 has none.
        torch.testing.assert_close(value, their_value, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(grad, their_grad, atol=1e-6, rtol=1e-5)
        assert grad.abs().min() > 1e-4


@pytest.mark.exercises("kl_penalty: values far from the reference")
@pytest.mark.parametrize("name", [*NAMES, "k1+", "k2+", "k3+", "abs+"])
def test_values_are_verls_at_any_distance(patched, name):
    distance = torch.tensor([[-200.0, -50.0, -20.5, -11.0, -2.7, 0.0, 3.0, 10.5, 15.0, 25.0, 60.0]])
    value = core_algos.kl_penalty(distance, torch.zeros_like(distance), name)
    torch.testing.assert_close(value, theirs(distance, torch.zeros_like(distance), name))


@pytest.mark.exercises("kl_penalty: k3 far from the reference keeps its gradient")
@pytest.mark.parametrize(("distance", "expected"), [(2.7, 13.88), (5.0, 147.4), (10.0, 22025.5)])
def test_the_clamp_of_k3_does_not_end_the_pull_back(patched, distance, expected):
    """Theirs: gradient 0 where the KL is clamped. Ours: that of k3, 1 - reference / policy."""
    log_prob = torch.full((1, 1), -distance)
    ref = torch.zeros(1, 1)
    value, grad = gradient(lambda x: core_algos.kl_penalty(x, ref, "low_var_kl"), log_prob)
    their_value, their_grad = gradient(lambda x: theirs(x, ref, "low_var_kl"), log_prob)
    assert value.item() == their_value.item() == 10.0
    assert their_grad.item() == 0.0
    torch.testing.assert_close(-grad.item(), expected, rtol=1e-3, atol=0)


@pytest.mark.exercises("kl_penalty: the straight-through gradient at any distance")
def test_the_straight_through_gradient_is_verls_at_any_distance(patched):
    log_prob = torch.tensor([[-30.0, -5.0, 0.1, 4.0, 40.0]])
    ref = torch.zeros_like(log_prob)
    _, grad = gradient(lambda x: core_algos.kl_penalty(x, ref, "k3+"), log_prob)
    _, their_grad = gradient(lambda x: theirs(x, ref, "k3+"), log_prob)
    torch.testing.assert_close(grad, their_grad)


@pytest.mark.exercises("kl_penalty: small differences")
def test_small_differences_are_not_rounded_away(patched):
    """Theirs: a KL of 0 after an update that moved log-probabilities by 2e-4. Ours: 2e-8."""
    moved = torch.full((1, 1), 2e-4)
    assert theirs(moved, torch.zeros(1, 1), "k3").item() == 0.0
    value = core_algos.kl_penalty(moved, torch.zeros(1, 1), "k3").item()
    torch.testing.assert_close(value, 2e-8, rtol=2e-3, atol=0)


@pytest.mark.exercises('kl_penalty "full": exact, of logits and of log-probabilities')
def test_full_is_the_exact_kl(patched):
    """Theirs: NotImplementedError."""
    generator = torch.Generator().manual_seed(0)
    logits, ref = (3 * torch.randn(2, 4, 50, generator=generator) for _ in range(2))
    with pytest.raises(NotImplementedError):
        theirs(logits, ref, "full")

    def exact(x):
        log_p, log_q = x.double().log_softmax(-1), ref.double().log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    expected, expected_grad = gradient(exact, logits)
    for reference in (ref, ref.log_softmax(-1)):
        value, grad = gradient(
            partial(core_algos.kl_penalty, ref_logprob=reference, kl_penalty="full"), logits
        )
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)
    normalised = core_algos.kl_penalty(logits.log_softmax(-1), ref.log_softmax(-1), "full")
    torch.testing.assert_close(normalised.double(), expected, rtol=1e-5, atol=1e-6)


def batch_of(mask, log_probs, ref, scores):
    return DataProto.from_dict(
        tensors={
            "response_mask": mask.long(),
            "old_log_probs": log_probs,
            "ref_log_prob": ref,
            "token_level_scores": scores,
        }
    )


@pytest.mark.exercises('kl_penalty "full": refused where there is no vocabulary')
def test_full_is_refused_in_the_trainer(patched, log_probs):
    with pytest.raises(ValueError, match=r'"full".*\(5, 9\).*\[B, T, V\]'):
        core_algos.kl_penalty(log_probs, log_probs, "full")
    data = batch_of(mask_of("full"), log_probs, log_probs, log_probs)
    controller = core_algos.FixedKLController(0.1)
    with pytest.raises(ValueError, match=r'"full".*vocabulary'):
        ray_trainer.apply_kl_penalty(data, controller, "full")


def shaped(data, controller, name="kl", *, by):
    if by == "verl":
        return apply_theirs(data, controller, kl_penalty=name)
    with verl.patch():
        return ray_trainer.apply_kl_penalty(data, controller, kl_penalty=name)


@pytest.mark.exercises("apply_kl_penalty: rewards, metrics and the adaptive coefficient")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["kl", "k2", "low_var_kl", "k3+"])
def test_rewards_are_verls(log_probs, kind, name):
    mask = mask_of(kind)
    ref = log_probs_near(log_probs, 1.5, seed=1)
    last = mask.long().cumsum(1).argmax(1)
    outcome = torch.linspace(-1, 2, len(mask))
    scores = torch.zeros(SHAPE).scatter(1, last[:, None], outcome[:, None])
    results = []
    for by in ("kl_kernels", "verl"):
        controller = core_algos.AdaptiveKLController(0.2, target_kl=0.3, horizon=100)
        data, metrics = shaped(batch_of(mask, log_probs, ref, scores), controller, name, by=by)
        results.append((data.batch["token_level_rewards"], metrics, controller.value))
    (rewards, metrics, value), (their_rewards, their_metrics, their_value) = results
    torch.testing.assert_close(rewards, their_rewards)
    assert metrics == pytest.approx(their_metrics, rel=1e-5)
    assert value == pytest.approx(their_value, rel=1e-6)
    assert value != 0.2
    if name == "kl":
        own = kl_kernels.compute_rewards(outcome, log_probs - ref, mask, 0.2)
        torch.testing.assert_close(own, their_rewards)


@pytest.mark.exercises("apply_kl_penalty: NaN at masked positions")
def test_nan_where_masked_stays_there(log_probs):
    """Theirs: rewards of NaN * 0 beyond the response. Ours: as if there were none."""
    mask = mask_of("right padding")
    ref = log_probs_near(log_probs, 0.5, seed=1)
    outcome = torch.where(mask, 1.0, 0.0)
    results = []
    for by, bad in (("kl_kernels", torch.nan), ("kl_kernels", 0.0), ("verl", torch.nan)):
        controller = core_algos.AdaptiveKLController(0.2, target_kl=0.3, horizon=100)
        polluted = ref.masked_fill(~mask, bad)
        data, metrics = shaped(batch_of(mask, log_probs, polluted, outcome), controller, by=by)
        results.append((data.batch["token_level_rewards"], controller.value))
    (rewards, value), (clean, clean_value), (their_rewards, their_value) = results
    torch.testing.assert_close(rewards, clean, rtol=0, atol=0)
    assert value == clean_value
    assert their_rewards[~mask].isnan().all()
    assert their_value == pytest.approx(value)


@pytest.mark.exercises("KL controllers: fixed and adaptive")
def test_controllers_move_as_verls_do():
    adaptive = core_algos.AdaptiveKLController(0.2, target_kl=6.0, horizon=10000)
    own = kl_kernels.AdaptiveKLController(0.2, target=6.0, horizon=10000, unit="token_mean")
    fixed = core_algos.FixedKLController(0.2)
    own_fixed = kl_kernels.FixedKLController(0.2)
    for current in (0.0, 3.0, 6.5, 30.0, 5.9, 7.0):
        adaptive.update(current, n_steps=512)
        own.update(current, n_steps=512)
        fixed.update(current, n_steps=512)
        own_fixed.update(current, n_steps=512)
        assert own.value == pytest.approx(adaptive.value, rel=1e-12)
        assert own_fixed.value == fixed.value
    assert own.value != 0.2


@pytest.mark.exercises("KL controllers: a KL that is not a number")
def test_a_nan_does_not_end_the_controller():
    """Theirs: the coefficient is NaN from then on. Ours: it stays, and the update says so."""
    adaptive = core_algos.AdaptiveKLController(0.2, target_kl=6.0, horizon=10000)
    adaptive.update(float("nan"), n_steps=512)
    assert adaptive.value != adaptive.value
    own = kl_kernels.AdaptiveKLController(0.2, target=6.0, horizon=10000, unit="token_mean")
    assert not own.update(float("nan"), n_steps=512).applied
    assert own.value == 0.2
