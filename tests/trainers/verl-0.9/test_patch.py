"""A whole computation with the patch and without, and what remains when it is undone."""

import os
import subprocess
import sys

import pytest
import torch
import verl.utils.torch_functional as verl_F
from patches import check_same_steps, check_undo, code_of
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils import tensordict_utils
from verl.workers.config import ActorConfig
from verl.workers.utils import losses

from kl_kernels.integrations import verl

ROWS, PROMPT, RESPONSE, VOCABULARY = 4, 3, 8, 37
N_STEPS = 4


def whole_step(policy, ref_logits, controller, generator, config):
    """Logits -> log-probabilities -> KL -> rewards -> GAE -> the actor's loss -> gradient."""
    lengths = torch.tensor([8, 5, 1, 7])
    mask = torch.arange(RESPONSE) < lengths[:, None]
    tokens = torch.randint(0, VOCABULARY, (ROWS, PROMPT + RESPONSE), generator=generator)
    attention = torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.bool), mask], 1)
    moved = policy + 0.3 * torch.randn(policy.shape, generator=generator)
    logits = moved.requires_grad_()

    def model(x):  # [B, P + T, V] -> log-probabilities and entropy of what is not padding
        packed, labels = x[attention], tokens.roll(-1, 1)[attention]
        return {
            "log_probs": verl_F.logprobs_from_logits(packed, labels, inplace_backward=False),
            "entropy": verl_F.entropy_from_logits(packed),
        }

    data = TensorDict(
        {
            "prompts": tokens[:, :PROMPT],
            "responses": tokens[:, PROMPT:],
            "attention_mask": attention,
            "response_mask": mask.long(),
        },
        batch_size=[ROWS],
    )
    with torch.no_grad():
        for name, x in (("old_log_probs", policy), ("ref_log_prob", ref_logits)):
            data[name] = losses.no_padding_2_padding(model(x)["log_probs"], data)
    outcome = torch.rand(ROWS, 1, generator=generator)
    scores = torch.zeros(ROWS, RESPONSE).scatter(1, lengths[:, None] - 1, outcome)
    values = torch.randn(ROWS, RESPONSE, generator=generator)
    proto = DataProto(batch=data.clone())
    proto.batch["token_level_scores"], proto.batch["values"] = scores, values
    proto, metrics = ray_trainer.apply_kl_penalty(proto, controller)
    proto = ray_trainer.compute_advantage(proto, "gae", gamma=1.0, lam=0.95, config={})
    data["advantages"] = proto.batch["advantages"]
    for key, value in (("dp_size", 1), ("batch_num_tokens", None), ("global_batch_size", None)):
        tensordict_utils.assign_non_tensor_data(data, key, value)
    loss, loss_metrics = losses.ppo_loss(config, model(logits), data)
    loss.backward()
    numbers = {k: getattr(v, "values", v) for k, v in {**metrics, **loss_metrics}.items()}
    numbers.pop("actor/ppo_kl_k3", None)
    return {
        "rewards": proto.batch["token_level_rewards"][mask],
        "advantages": proto.batch["advantages"][mask],
        "returns": proto.batch["returns"][mask],
        "loss": loss.detach(),
        "gradient": logits.grad,
        "kl_coef": torch.tensor(float(controller.value)),
        "metrics": torch.tensor(
            [float(torch.as_tensor(numbers[k]).float().sum()) for k in sorted(numbers)]
        ),
    }


def train(loss_mode, kl_loss_type):
    """Several steps of a policy that moves, with a coefficient that follows its KL."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, PROMPT + RESPONSE, VOCABULARY)
    policy = 2 * torch.randn(shape, generator=generator)
    # Near enough that no k3 is clamped: there gradients differ, as test_kl.py has it.
    ref_logits = policy + 0.4 * torch.randn(shape, generator=generator)
    controller = core_algos.AdaptiveKLController(0.1, target_kl=0.1, horizon=50)
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=1,
        use_dynamic_bsz=True,
        use_kl_loss=True,
        kl_loss_coef=0.1,
        kl_loss_type=kl_loss_type,
        entropy_coeff=0.01,
        policy_loss={"loss_mode": loss_mode},
    )
    steps = []
    for _ in range(N_STEPS):
        steps.append(whole_step(policy, ref_logits, controller, generator, config))
        policy = policy - steps[-1]["gradient"]
    return steps


@pytest.mark.exercises("a whole step, from logits to their gradient, through verl's own loss")
@pytest.mark.parametrize("loss_mode", ["vanilla", "kl_kernels"])
@pytest.mark.parametrize("kl_loss_type", ["low_var_kl", "k3+"])
def test_whole_steps_are_the_same(loss_mode, kl_loss_type):
    theirs = train("vanilla", kl_loss_type)
    with verl.patch():
        ours = train(loss_mode, kl_loss_type)
    check_same_steps(ours, theirs)


PLACES = {
    verl_F: (
        "logprobs_from_logits",
        "entropy_from_logits",
        "entropy_from_logits_with_chunking",
        "masked_whiten",
    ),
    core_algos: (
        "kl_penalty",
        "compute_gae_advantage_return",
        "get_adv_estimator_fn",
        "get_policy_loss_fn",
    ),
    ray_trainer: ("apply_kl_penalty",),
    losses: ("kl_penalty", "get_policy_loss_fn"),
}


@pytest.mark.exercises("patch and undo: every reference that verl holds")
def test_undo_restores_the_originals():
    registries = core_algos.POLICY_LOSS_REGISTRY, core_algos.ADV_ESTIMATOR_REGISTRY
    held = [dict(registry) for registry in registries]
    check_undo(verl.patch, PLACES)
    assert [dict(registry) for registry in registries] == held


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.exercises("importing the integration changes nothing")
def test_importing_patches_nothing():
    code = "import sys; from kl_kernels.integrations import verl; assert 'verl' not in sys.modules"
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.exercises("the code of the how-to page, by VERL_USE_EXTERNAL_MODULES")
def test_a_worker_is_patched_by_an_environment_variable(tmp_path, request):
    (tmp_path / "patched.py").write_text(code_of(request, "verl.md"))
    code = (
        "import verl.workers.utils.losses as w, verl.trainer.ppo.core_algos as c\n"
        "assert w.kl_penalty is c.kl_penalty\n"
        "assert c.kl_penalty.__module__ == 'kl_kernels.integrations.verl'\n"
    )
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = run(code, VERL_USE_EXTERNAL_MODULES="patched", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
