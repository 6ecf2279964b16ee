"""GRPO and RLOO steps with and without the fused functions: the same training."""

import math

import pytest
import torch
from datasets import Dataset
from tiny import assert_same_weights, folder, load_policy, make_tokenizer, prompts, reward_vowels
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from kl_kernels.integrations import trl, trl_heads

__all__ = ["folder"]
TRAINERS = {"grpo": (GRPOTrainer, GRPOConfig), "rloo": (RLOOTrainer, RLOOConfig)}


def train(name, folder, tmp_path, peft_config=None, load=load_policy, **options):
    """The model and the logs of three steps."""
    trainer_class, config_class = TRAINERS[name]
    config = config_class(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=12, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd",
        logging_steps=1, save_strategy="no", report_to=[], seed=0, use_cpu=True,
        **({"beta": 0.1, "temperature": 0.8, "bf16": False} | options),
    )  # fmt: skip
    trainer = trainer_class(
        model=load(folder),
        reward_funcs=reward_vowels,
        args=config,
        train_dataset=Dataset.from_list(prompts()),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer.model, [log for log in trainer.state.log_history if "loss" in log]


@pytest.fixture
def calls(monkeypatch):
    """Count the tokens of each call of the linear head."""
    counted = []
    real = trl_heads.linear_token_stats

    def counting(hidden, *args, **kwargs):
        counted.append(len(hidden))
        return real(hidden, *args, **kwargs)

    monkeypatch.setattr(trl_heads, "linear_token_stats", counting)
    return counted


TIMES = ("time", "runtime", "per_second", "tokens_per")


@pytest.mark.exercises("GRPO and RLOO steps, beta > 0: loss, gradient norm, metrics, weights")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {}),
        ("grpo", {"loss_type": "grpo", "num_iterations": 2, "use_bias_correction_kl": False}),
        ("grpo", {"loss_type": "dr_grpo", "importance_sampling_level": "sequence"}),
        ("grpo", {"loss_type": "cispo", "entropy_coef": 0.01}),
        ("rloo", {}),
        ("rloo", {"num_iterations": 2}),
    ],
)
def test_the_same_steps(name, options, folder, tmp_path, calls):
    theirs, their_logs = train(name, folder, tmp_path, **options)
    assert not calls
    with trl.patch():
        ours, our_logs = train(name, folder, tmp_path, **options)
    assert sum(calls) > 100
    # Otherwise nothing would be compared: the KL counts, and weights move.
    kls = [log["kl"] for log in their_logs if "kl" in log]  # not where answers are used again
    assert kls
    assert min(kls + [log["grad_norm"] for log in their_logs]) > 0.01
    start = load_policy(folder)
    moved = [(a - b).abs().max() for a, b in zip(theirs.parameters(), start.parameters())]
    assert max(moved) > 1e-3
    assert len(our_logs) == len(their_logs) == 3
    for ours_at, theirs_at in zip(our_logs, their_logs):
        assert ours_at.keys() == theirs_at.keys()
        for key, value in theirs_at.items():
            if not any(word in key for word in TIMES):
                assert math.isclose(ours_at[key], value, rel_tol=2e-4, abs_tol=2e-6), key
    assert_same_weights(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.exercises("GRPO under bf16 autocast")
def test_autocast(folder, tmp_path, calls):
    """Both round hidden states and weight to bfloat16; TRL the logits as well."""
    with trl.patch():
        _, ours = train("grpo", folder, tmp_path, bf16=True)
    assert calls
    _, theirs = train("grpo", folder, tmp_path, bf16=True)
    for key in ("kl", "grad_norm"):
        assert math.isclose(ours[0][key], theirs[0][key], rel_tol=0.02)


@pytest.mark.exercises("a LoRA policy")
def test_lora(folder, tmp_path, calls):
    from peft import LoraConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def run():
        torch.manual_seed(0)
        return train("grpo", folder, tmp_path, peft_config=lora)

    theirs, their_logs = run()
    with trl.patch():
        ours, our_logs = run()
    assert calls
    assert their_logs[0]["grad_norm"] > 0.01
    assert math.isclose(our_logs[0]["grad_norm"], their_logs[0]["grad_norm"], rel_tol=1e-4)
    assert_same_weights(ours, theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.exercises("GRPO and RLOO: an adapter on the output layer")
@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_an_adapter_on_the_output_layer(name, folder, tmp_path):
    """TRL refuses PEFT's models; of adapters inside of a model the patch tells. They get no
    gradient: TRL scores with the layer's own weight."""
    from peft import LoraConfig, inject_adapter_in_model

    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
    with trl.patch(), pytest.raises(ValueError, match="PEFT adapter to `lm_head`"):
        train(name, folder, tmp_path, peft_config=lora)

    def adapted(path):
        return inject_adapter_in_model(lora, load_policy(path))

    with trl.patch(), pytest.warns(RuntimeWarning, match="the adapter neither counts nor learns"):
        model, _ = train(name, folder, tmp_path, load=adapted)
    head = model.get_output_embeddings()
    assert not any(p.any() for p in head.lora_B.parameters())  # as it began
