"""A whole computation with the patch and without, and what remains when it is undone."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from openrlhf.models import actor, loss, utils
from openrlhf.trainer.ppo_utils import experience_maker, kl_controller
from openrlhf.trainer.ray import ppo_actor
from patches import check_same_steps, check_undo, code_of

from kl_kernels.integrations import openrlhf

ROWS, RESPONSE, VOCABULARY = 4, 8, 37
N_STEPS = 4


def log_probs_of(logits, sequences, mask):
    """Compute them as `Actor.forward` does: shifted by one, and multiplied by the mask."""
    rolled = torch.roll(sequences, shifts=-1, dims=1)
    log_probs = actor.log_probs_from_logits(logits, rolled)[:, :-1]
    return log_probs[:, -mask.shape[1] :] * mask.float()


def whole_step(policy, ref_logits, controller, generator, estimator, unbiased):
    """Logits -> log-probabilities -> KL -> rewards -> GAE -> the actor's loss -> gradient."""
    lengths = torch.tensor([8, 5, 1, 7])
    mask = torch.arange(RESPONSE) < lengths[:, None]
    sequences = torch.randint(0, VOCABULARY, (ROWS, RESPONSE + 2), generator=generator)
    moved = policy + 0.3 * torch.randn(policy.shape, generator=generator)
    logits = moved.requires_grad_()

    old, ref = (log_probs_of(x, sequences, mask) for x in (policy, ref_logits))
    experience = SimpleNamespace(
        rewards=torch.rand(ROWS, generator=generator),
        index=list(range(ROWS)),
        info={},
        values=torch.randn(ROWS, RESPONSE, generator=generator),
        action_mask=mask,
        kl=experience_maker.compute_approx_kl(old, ref, kl_estimator="k1"),
    )
    rewards = experience_maker.compute_reward(
        experience.rewards, controller.value, experience.kl, mask, reward_clip_range=(-10, 10)
    )
    advantages, returns = experience_maker.RemoteExperienceMaker.get_advantages_and_returns(
        None, experience.values, rewards, mask, 1.0, 0.95
    )
    log_probs = log_probs_of(logits, sequences, mask)
    actor_loss, clip_ratio, ppo_kl, *_ = loss.PolicyLoss()(log_probs, old, advantages, mask)
    kl = ppo_actor.compute_approx_kl(
        log_probs, ref, log_probs_old=old, kl_estimator=estimator, unbiased_gradient=unbiased
    )
    kl_loss = ppo_actor.aggregate_loss(kl, mask)
    entropy = actor.compute_entropy(logits)[:, :-1][:, -RESPONSE:]
    entropy_loss = ppo_actor.masked_mean(entropy, mask)
    total = actor_loss + 0.1 * kl_loss - 0.01 * entropy_loss
    total.backward()
    controller.update(utils.masked_mean(experience.kl, mask).item(), n_steps=ROWS)
    return {
        "rewards": rewards,
        "advantages": advantages[mask],
        "returns": returns[mask],
        "loss": total.detach(),
        "gradient": logits.grad,
        "kl_coef": torch.tensor(float(controller.value)),
        "metrics": torch.stack([clip_ratio, ppo_kl, kl_loss.detach(), entropy_loss.detach()]),
    }


def train(estimator, unbiased):
    """Several steps of a policy that moves, with a coefficient that follows its KL."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, RESPONSE + 2, VOCABULARY)
    policy = 2 * torch.randn(shape, generator=generator)
    # Near enough that no KL is clamped: there gradients differ, as test_kl.py has it.
    ref_logits = policy + 0.4 * torch.randn(shape, generator=generator)
    controller = kl_controller.AdaptiveKLController(0.2, target=0.1, horizon=50)
    steps = []
    for _ in range(N_STEPS):
        steps.append(whole_step(policy, ref_logits, controller, generator, estimator, unbiased))
        policy = policy - steps[-1]["gradient"]
    return steps


@pytest.mark.exercises("a whole step, from logits to their gradient, through OpenRLHF's own loss")
@pytest.mark.parametrize(("estimator", "unbiased"), [("k3", False), ("k2", False), ("k1", True)])
def test_whole_steps_are_the_same(estimator, unbiased):
    theirs = train(estimator, unbiased)
    with openrlhf.patch():
        ours = train(estimator, unbiased)
    check_same_steps(ours, theirs)


PLACES = {
    utils: (
        "log_probs_from_logits",
        "compute_entropy",
        "compute_approx_kl",
        "compute_reward",
        "masked_mean",
    ),
    actor: ("log_probs_from_logits", "compute_entropy"),
    experience_maker: ("compute_approx_kl", "compute_reward", "masked_mean"),
    ppo_actor: ("compute_approx_kl", "masked_mean"),
    loss: ("masked_mean",),
}


@pytest.mark.exercises("patch and undo: every reference that OpenRLHF holds")
def test_undo_restores_the_originals():
    check_undo(openrlhf.patch, PLACES)


@pytest.mark.exercises("importing the integration changes nothing")
def test_importing_patches_nothing():
    code = (
        "import sys; from kl_kernels.integrations import openrlhf\n"
        "assert 'openrlhf' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.exercises("the code of the how-to page")
def test_what_ray_is_to_call_in_each_worker(monkeypatch, request):
    code = code_of(request, "openrlhf.md")
    patches, patch = [], openrlhf.patch
    monkeypatch.setattr(openrlhf, "patch", lambda: patches.append(patch()))
    names = {}
    exec(code, names)
    original = utils.compute_reward
    names["everywhere"]()
    assert experience_maker.compute_reward is utils.compute_reward is not original
    patches[0].undo()
    assert experience_maker.compute_reward is original
