"""Calls of the output layer that are taken over where preferences or demonstrations teach."""

import pytest
from datasets import Dataset
from tiny import LETTERS, folder, load_policy, make_model, make_tokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from kl_kernels.integrations import trl, trl_heads

__all__ = ["folder"]
PAIRS = [
    {"prompt": LETTERS[i : i + 3], "chosen": LETTERS[i + 3 : i + 7], "rejected": "zyx "}
    for i in range(8)
]
TRAINERS = {
    "dpo": (DPOTrainer, DPOConfig, PAIRS),
    "kto": (
        KTOTrainer,
        KTOConfig,
        [
            {"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0}
            for i, row in enumerate(PAIRS)
        ],
    ),
    "sft": (
        SFTTrainer,
        SFTConfig,
        [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    ),
}


@pytest.fixture
def heads(monkeypatch):
    """(outputs asked for, whether ours computed them) of each call of the output layer."""
    calls, ours = [], []
    real, stats = trl_heads.LogprobHead.apply, trl_heads.linear_token_stats

    def apply(self, *args):
        ours.clear()
        found = real(self, *args)
        calls.append((frozenset(args[8]), bool(ours)))
        return found

    monkeypatch.setattr(trl_heads.LogprobHead, "apply", apply)
    monkeypatch.setattr(
        trl_heads, "linear_token_stats", lambda *a, **k: ours.append(1) or stats(*a, **k)
    )
    return calls


@pytest.mark.exercises("DPO, KTO and SFT: policies stay TRL's, reference models are taken over")
@pytest.mark.parametrize("name", TRAINERS)
def test_which_calls_are_ours(name, folder, tmp_path, heads):
    trainer_class, config_class, rows = TRAINERS[name]
    config = config_class(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to=[],
        save_strategy="no", use_cpu=True, bf16=False, max_length=16,
    )  # fmt: skip
    reference = {} if name == "sft" else {"ref_model": make_model()}
    trainer = trainer_class(
        model=load_policy(folder),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
        **reference,
    )
    with trl.patch():
        trainer.train()
    of_policy = {"dpo": "mean_logits", "kto": "mean_logits", "sft": "is_top1"}[name]
    assert {ours for outputs, ours in heads if of_policy in outputs} == {False}
    of_others = {ours for outputs, ours in heads if of_policy not in outputs}
    assert of_others == (set() if name == "sft" else {True})
