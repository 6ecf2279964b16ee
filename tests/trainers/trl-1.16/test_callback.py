"""KLMonitorCallback in a GRPO run: what it sees, how it stops, and that a run can be resumed."""

import json

import pytest
from datasets import Dataset
from tiny import folder, load_policy, make_tokenizer, prompts, reward_vowels
from trl import GRPOConfig, GRPOTrainer

from kl_kernels import AuditLog, KLMonitor
from kl_kernels.integrations.trl import KLMonitorCallback

__all__ = ["folder"]


def make_trainer(folder, output, callback, **options):
    config = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=8,
        num_generations=4,
        optim="sgd",
        max_completion_length=8,
        learning_rate=0.5,
        logging_steps=1,
        report_to=[],
        seed=0,
        use_cpu=True,
        **({"beta": 0.1, "max_steps": 4, "save_strategy": "no", "bf16": False} | options),
    )
    return GRPOTrainer(
        model=load_policy(folder),
        reward_funcs=reward_vowels,
        args=config,
        train_dataset=Dataset.from_list(prompts()),
        processing_class=make_tokenizer(),
        callbacks=[callback],
    )


class Recorder:
    def __init__(self):
        self.metrics, self.alerts = {}, []

    def log(self, step, metrics):
        self.metrics[step] = dict(metrics)

    def alert(self, event):
        self.alerts.append(event)

    def close(self):
        pass


@pytest.mark.exercises("KLMonitorCallback: KL, entropy, reward and gradient norm of each step")
def test_it_watches_what_the_trainer_logs(folder, tmp_path):
    recorder = Recorder()
    trainer = make_trainer(
        folder, tmp_path, KLMonitorCallback(KLMonitor(unit="token_mean", sinks=[recorder]))
    )
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "kl" in log}
    assert sorted(recorder.metrics) == sorted(logs) == [1, 2, 3, 4]
    for step, log in logs.items():
        seen = recorder.metrics[step]
        assert seen == {
            "kl_token_mean": log["kl"],
            "entropy": log["entropy"],
            "reward": log["reward"],
            "grad_norm": log["grad_norm"],
        }


@pytest.mark.exercises("KLMonitorCallback: ends training over a KL budget; audit log")
def test_a_budget_ends_training(folder, tmp_path):
    log = AuditLog(tmp_path / "audit.jsonl")
    monitor = KLMonitor(kl_budget=1e-3, unit="token_mean", sinks=[log])
    callback = KLMonitorCallback(monitor, stop_on={"kl_budget"})
    trainer = make_trainer(folder, tmp_path, callback)
    trainer.train()
    log.close()
    assert trainer.state.global_step == 1
    assert [event.kind for event in callback.events] == ["kl_budget"]
    records = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in records] == ["header", "metrics", "event"]


@pytest.mark.exercises("KLMonitorCallback: its state is in the trainer's checkpoints")
def test_a_resumed_run_knows_what_it_saw(folder, tmp_path):
    whole = KLMonitor(unit="token_mean")
    make_trainer(folder, tmp_path / "whole", KLMonitorCallback(whole)).train()
    begun = KLMonitor(unit="token_mean")
    options = {"save_strategy": "steps", "save_steps": 2}
    make_trainer(folder, tmp_path, KLMonitorCallback(begun), max_steps=2, **options).train()
    resumed = KLMonitor(unit="token_mean")
    trainer = make_trainer(folder, tmp_path, KLMonitorCallback(resumed), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    seen = resumed.state_dict()
    assert seen["step"] == 4
    # As many values as in the run that was never interrupted, the first two of them the same ones.
    windows = [state["detectors"]["kl_jump"] for state in (seen, whole.state_dict())]
    assert windows[0].keys() == windows[1].keys()
    lengths = [{k: len(v) for k, v in window.items() if isinstance(v, list)} for window in windows]
    assert lengths[0] == lengths[1]


@pytest.mark.exercises("KLMonitorCallback: a wrong unit or a missing KL is told")
@pytest.mark.parametrize(
    ("unit", "beta", "said"),
    [("sequence_sum", 0.1, "unit='token_mean'"), ("token_mean", 0.0, "is its beta 0")],
)
def test_nothing_to_watch_is_told_once(folder, tmp_path, unit, beta, said):
    callback = KLMonitorCallback(KLMonitor(unit=unit))
    with pytest.warns(RuntimeWarning, match=said) as caught:
        make_trainer(folder, tmp_path, callback, beta=beta, max_steps=2).train()
    assert sum("no KL is watched" in str(w.message) for w in caught) == 1
