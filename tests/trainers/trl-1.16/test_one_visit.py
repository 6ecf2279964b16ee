"""GRPO's output layer with gradients that are foreseen: the same training, with a product less."""

import math

import pytest
import torch
from datasets import Dataset
from test_steps import TIMES
from tiny import assert_same_weights, folder, load_policy, make_tokenizer, prompts, reward_vowels
from trl import GRPOConfig, GRPOTrainer

from kl_kernels.integrations import trl, trl_heads, trl_one_visit

__all__ = ["folder"]


def make(folder, tmp_path, **options):
    config = GRPOConfig(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4,
        gradient_accumulation_steps=2, max_completion_length=12, learning_rate=0.5, optim="sgd",
        lr_scheduler_type="constant", temperature=0.8, logging_steps=1, report_to=[], seed=0,
        use_cpu=True, bf16=False, **({"save_strategy": "no"} | options),
    )  # fmt: skip
    return GRPOTrainer(
        model=load_policy(folder),
        reward_funcs=reward_vowels,
        args=config,
        train_dataset=Dataset.from_list(prompts(16)),
        processing_class=make_tokenizer(),
    )


@pytest.fixture
def seen(monkeypatch):
    """The factor of each backward that was foreseen, and None of one that was not."""
    factors = []
    real = trl_one_visit._factor

    def recording(*args):
        factors.append(real(*args))
        return factors[-1]

    monkeypatch.setattr(trl_one_visit, "_factor", recording)
    return factors


def forbid(monkeypatch):
    """Let the head that makes its gradients in backward fail where it is differentiated."""
    real = trl_heads.linear_token_stats

    def without_gradient(*args, **options):
        assert not torch.is_grad_enabled()
        return real(*args, **options)

    monkeypatch.setattr(trl_heads, "linear_token_stats", without_gradient)
    monkeypatch.setattr(trl_one_visit, "linear_token_stats", without_gradient)


def assert_same_logs(ours, theirs):
    ours, theirs = ([log for log in logs if "loss" in log] for logs in (ours, theirs))
    assert len(ours) == len(theirs) > 0
    for of_ours, of_theirs in zip(ours, theirs):
        assert of_ours.keys() == of_theirs.keys()
        for key, value in of_theirs.items():
            if not any(word in key for word in TIMES):
                assert math.isclose(of_ours[key], value, rel_tol=2e-4, abs_tol=2e-6), key


@pytest.mark.exercises("GRPO in one visit: three steps of two micro-batches, a run that is resumed")
@pytest.mark.parametrize("options", [{}, {"loss_type": "grpo", "top_k": 5}])
def test_the_same_steps(options, folder, tmp_path, seen, monkeypatch):
    theirs = make(folder, tmp_path / "theirs", **options)
    theirs.train()
    forbid(monkeypatch)
    saving = {"save_strategy": "steps", "save_steps": 1}
    with trl.patch():
        make(folder, tmp_path / "ours", **options, **saving).train()
        assert seen == [1.0] * 6  # each micro-batch as foreseen, no factor left
        ours = make(folder, tmp_path / "ours", **options)
        ours.train(resume_from_checkpoint=str(tmp_path / "ours" / "checkpoint-2"))
    assert seen == [1.0] * 8
    assert min(log["grad_norm"] for log in theirs.state.log_history if "loss" in log) > 0.01
    assert_same_logs(ours.state.log_history, theirs.state.log_history)
    assert_same_weights(ours.model, theirs.model, rtol=1e-4, atol=2e-6)


def batch(trainer, seed=0):
    """A micro-batch as `GRPOTrainer` hands it to its loss; the last answer is empty."""
    torch.manual_seed(seed)
    lengths = torch.tensor([[5], [1], [4], [0]])
    mask = (torch.arange(5) < lengths).long()
    return {
        "prompt_ids": torch.randint(2, 30, (4, 3)),
        "prompt_mask": torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 1], [1, 1, 1]]),
        "completion_ids": torch.randint(2, 30, (4, 5)),
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -0.7, 0.3, 0.5]),
        "num_items_in_batch": torch.tensor(17.0),
    }


LOSSES = [
    *({"loss_type": kind} for kind in ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo")),
    {"loss_type": "cispo", "epsilon_high": 5.0},
    *({"loss_type": kind} for kind in ("sapo", "vespo")),
    *(
        {"loss_type": kind, "importance_sampling_level": "sequence"}
        for kind in ("grpo", "dapo", "luspo")
    ),
    {"delta": 1.5},
]


def of_loss(trainer, inputs):
    trainer.model.zero_grad()
    with torch.enable_grad():
        loss = trainer._compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items() if values}
    return loss.detach(), gradients, metrics


def assert_same_losses(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    largest = max(g.abs().max() for g in theirs[1].values())
    assert largest > 1e-3
    for name, gradient in theirs[1].items():
        torch.testing.assert_close(ours[1][name], gradient, rtol=1e-4, atol=1e-6 * largest)
    torch.testing.assert_close(ours[2], theirs[2], rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="module")
def trainer(folder, tmp_path_factory):
    made = make(folder, tmp_path_factory.mktemp("trainer"))
    made.current_gradient_accumulation_steps = 2
    made.model.train()
    return made


def set_options(trainer, monkeypatch, options):
    for name, value in options.items():
        for owner in (trainer, trainer.args):
            if hasattr(owner, name):
                monkeypatch.setattr(owner, name, value)
    assert options.items() <= {**vars(trainer.args), **vars(trainer)}.items()


@pytest.mark.exercises("GRPO in one visit: every loss type's value, gradients and metrics")
@pytest.mark.parametrize(
    "options", LOSSES, ids=lambda options: "-".join(map(str, options.values()))
)
@pytest.mark.parametrize("tools", [False, True], ids=["", "tools"])
def test_every_loss_type(options, tools, trainer, seen, monkeypatch):
    set_options(trainer, monkeypatch, options)
    inputs = batch(trainer)
    if tools:  # a tool's tokens are scored and not trained on
        inputs["tool_mask"] = torch.tensor([[1, 0, 1, 1, 0]] * 4)
    theirs = of_loss(trainer, inputs)
    with trl.patch():
        ours = of_loss(trainer, inputs)
    assert seen == [1.0]
    assert_same_losses(ours, theirs)


@pytest.mark.exercises("GRPO: losses whose gradient is not foreseen")
@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"beta": 0.1}, {"ref_per_token_logps": -3 * torch.ones(4, 5)}),
        ({}, {"old_per_token_logps": -3 * torch.ones(4, 5)}),
        ({"entropy_coef": 0.1, "_entropy_bonus_enabled": True}, {}),
        ({"top_entropy_quantile": 0.5}, {}),
        ({"off_policy_mask_threshold": 0.5}, {}),
    ],
    ids=["kl", "later update", "entropy bonus", "entropy mask", "distance mask"],
)
def test_not_foreseen(options, given, trainer, seen, monkeypatch):
    for name, value in options.items():
        monkeypatch.setattr(trainer, name, value)
    inputs = batch(trainer) | given
    theirs = of_loss(trainer, inputs)
    with trl.patch():
        ours = of_loss(trainer, inputs)
    assert not seen
    assert_same_losses(ours, theirs)


@pytest.mark.exercises("GRPO: a subclass's loss that is another than the one foreseen")
def test_a_surprise(trainer, seen, monkeypatch):
    """Its gradients are computed again; a loss that is a multiple of TRL's keeps the foreseen."""
    real = trl_one_visit.foresee

    def foresee_another(*args):
        foreseen = real(*args)
        return foreseen._replace(gradient=foreseen.gradient * torch.linspace(1, 2, 5))

    inputs = batch(trainer)
    theirs = of_loss(trainer, inputs)
    monkeypatch.setattr(trl_one_visit, "foresee", foresee_another)
    with trl.patch():
        ours = of_loss(trainer, inputs)
    assert seen == [None]
    assert_same_losses(ours, theirs)
    monkeypatch.setattr(trl_one_visit, "foresee", lambda *a: real(*a)._replace(
        gradient=real(*a).gradient / 3))  # fmt: skip
    with trl.patch():
        ours = of_loss(trainer, inputs)
    assert seen[1] == pytest.approx(3, rel=1e-6)
    assert_same_losses(ours, theirs)
