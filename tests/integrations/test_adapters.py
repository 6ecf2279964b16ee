"""An adapter on the output layer: who tells of it, and how its weight is put together."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import kl_kernels
from kl_kernels.integrations.adapters import warn_of_adapted_head

IDS = torch.arange(10).view(2, 5) % 16


@pytest.fixture
def adapted():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=8,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def told(model):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_adapted_head(model, "the trainer")
    return [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


def test_an_adapter_is_told_of(adapted):
    (message,) = told(adapted)
    assert "the trainer multiplies by its weight alone" in message


def test_an_adapter_that_is_merged_or_off_is_not(adapted):
    with adapted.disable_adapter():
        assert not told(adapted)
    adapted.merge_adapter()
    assert not told(adapted)


def test_other_output_layers_are_not(adapted):
    assert not told(adapted.unload())
    assert not told(SimpleNamespace(get_output_embeddings=lambda: None))
    whole = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert not told(get_peft_model(adapted.unload(), whole))


def test_a_stand_in_for_layers_of_other_packages():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(3, 4)

    assert told(SimpleNamespace(get_output_embeddings=Around))


def test_the_weight_with_its_adapter_is_the_models(adapted):
    """The advice of docs/how-to/any-trainer.md: the sum, whose gradient reaches the adapter."""
    head = adapted.get_output_embeddings()
    adapters = [head.lora_A["default"].weight, head.lora_B["default"].weight]
    logits = adapted(IDS).logits
    whole = kl_kernels.token_stats(logits, IDS)
    expected = torch.autograd.grad(whole.logprob.sum(), adapters)
    hidden = adapted.get_base_model().model(IDS).last_hidden_state
    alone = kl_kernels.linear_token_stats(hidden, head.weight, IDS)
    assert (alone.logprob - whole.logprob).abs().max() > 1e-3
    weight = head.base_layer.weight + head.get_delta_weight("default")
    both = kl_kernels.linear_token_stats(hidden, weight, IDS)
    torch.testing.assert_close(both.logprob, whole.logprob, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(both.logprob.sum(), adapters)
    for one, other in zip(found, expected):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
