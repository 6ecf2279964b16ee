"""Updates that go too far are undone bit for bit; early stopping leaves the rest of a batch."""

import copy

import pytest
import torch
from micro import train

from kl_kernels.lab.ppo import loop
from kl_kernels.lab.ppo.checkpoint import load_state
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.policy import Policy
from kl_kernels.lab.ppo.report import read_metrics
from kl_kernels.monitor.constraint import ConstraintViolation

LIMITS = {"max_update_kl": 1e-9, "learning_rate": 1e-2, "updates": 3}


@pytest.fixture
def reached(monkeypatch):
    """Weights that each update reached, before anything is undone."""
    weights, run_epochs = [], loop.Trainer.run_epochs

    def recorded(trainer, *arguments, **options):
        result = run_epochs(trainer, *arguments, **options)
        weights.append(copy.deepcopy(trainer.policy.state_dict()))
        return result

    monkeypatch.setattr(loop.Trainer, "run_epochs", recorded)
    return weights


@pytest.mark.parametrize("limit", [{"max_update_kl": 1e-9}, {"max_ratio": 1.0001}])
def test_a_skipped_update_leaves_weights_and_optimizer_as_they_were(
    tmp_path, model_folder, reached, limit
):
    options = LIMITS | {"max_update_kl": 0.0} | limit
    records = train(tmp_path / "run", model_folder, constraint="skip", **options)
    assert all("beyond" in record["violation"] for record in records)
    assert all(record["kl"] < 1e-6 for record in records), "the next rollout is of another policy"
    saved = load_state(tmp_path / "run" / "checkpoint.pt")
    start = Policy(load_model(model_folder)[0]).lm.state_dict(prefix="lm.")
    for name, weight in start.items():
        assert torch.equal(saved["policy"][name], weight), name
    assert saved["optimizer"]["state"] == {}
    for weights in reached:
        assert any(not torch.equal(weights[name], weight) for name, weight in start.items())


def test_a_skipped_update_leaves_moments_and_step_counts_as_they_were(tmp_path, model_folder):
    options = {"learning_rate": 1e-2, "constraint": "skip"}
    train(tmp_path / "run", model_folder, updates=1, **options)
    before = load_state(tmp_path / "run" / "checkpoint.pt")
    assert before["optimizer"]["state"][0]["step"] > 0
    records = train(tmp_path / "run", model_folder, updates=2, max_update_kl=1e-9, **options)
    after = load_state(tmp_path / "run" / "checkpoint.pt")
    assert records[1]["violation"]
    assert records[1]["steps"] > 0
    for part in ("policy", "optimizer"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert after["updates"] == 2


def test_a_kept_update_is_within_its_limits_after_its_last_step_too(tmp_path, model_folder):
    """With one step per update, only the measurement after it can find that it went too far."""
    options = LIMITS | {"minibatches": 1, "epochs": 1}
    records = train(tmp_path / "run", model_folder, constraint="skip", **options)
    assert all(record["approx_kl"] < 1e-9 for record in records), "the step was measured beforehand"
    assert all(record["violation"] for record in records)


def test_logging_keeps_the_update(tmp_path, model_folder):
    records = train(tmp_path / "run", model_folder, constraint="log", **LIMITS)
    free = train(tmp_path / "free", model_folder, **LIMITS | {"max_update_kl": 0.0})
    assert all(record["violation"].endswith(": log") for record in records)
    for record, other in zip(records, free):
        assert record | {"violation": None} == other


def test_stopping_keeps_what_was_before(tmp_path, model_folder):
    records = train(tmp_path / "run", model_folder, constraint="stop", **LIMITS)
    assert [record["update"] for record in records] == [1]
    saved = load_state(tmp_path / "run" / "checkpoint.pt")
    assert saved["optimizer"]["state"] == {}
    assert saved["updates"] == 1


def test_rolling_back_restores_the_last_checkpoint(tmp_path, model_folder):
    records = train(
        tmp_path / "run", model_folder, constraint="rollback", checkpoint_every=2, **LIMITS
    )
    assert len(records) == 3
    assert all(record["kl"] < 1e-6 for record in records)
    assert load_state(tmp_path / "run" / "checkpoint.pt")["optimizer"]["state"] == {}


def test_raising_ends_the_run_before_its_checkpoint(tmp_path, model_folder):
    with pytest.raises(ConstraintViolation, match=r"^step 1: KL\(old policy \|\| policy\) of"):
        train(tmp_path / "run", model_folder, constraint="raise", **LIMITS)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(("rule", "steps"), [("before_step", 1), ("after_epoch", 2)])
def test_early_stopping_leaves_the_rest_of_the_batch(tmp_path, model_folder, rule, steps):
    """An update has two epochs of two minibatches, and its first step already goes too far."""
    options = {"updates": 2, "learning_rate": 1e-2, "target_kl": 1e-9, "early_stop": rule}
    for record in train(tmp_path / "run", model_folder, **options):
        assert record["stopped_early"]
        assert record["steps"] == steps
        assert record["violation"] is None
