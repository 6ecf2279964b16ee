"""A tokenizer, a model and prompts that are made here, small and offline."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?"


def make_tokenizer():
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_model(seed=0, **config):
    torch.manual_seed(seed)
    config = {
        "vocab_size": len(LETTERS) + 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    } | config
    return LlamaForCausalLM(LlamaConfig(**config))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The reference model and the tokenizer, saved as a trainer expects them."""
    path = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def load_policy(path):
    """The model of that folder, moved: a policy whose KL to its reference is not 0."""
    model = LlamaForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def prompts(n=8):
    return [{"prompt": LETTERS[i : i + 3 + i % 3]} for i in range(n)]


def reward_vowels(completions, **_):
    """Share of vowels: a reward that differs between answers."""
    return [sum(c in "aeiou" for c in text) / max(len(text), 1) for text in completions]


def assert_same_weights(one, other, *, rtol, atol):
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter, theirs[name], rtol=rtol, atol=atol, msg=name)
