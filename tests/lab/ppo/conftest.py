"""A language model of a few thousand weights, made once, that every test starts from."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kl_kernels.lab.ppo.checkpoint import save_model
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.pretrain import train_tokenizer
from kl_kernels.lab.ppo.task import load_corpus


@pytest.fixture(scope="session")
def paragraphs() -> list[str]:
    return load_corpus()[:60]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, paragraphs) -> Path:
    """A GPT-2, which notices a wrong position as its positions are absolute, with dropout.

    Weights are drawn large, so that its distributions are far from uniform.
    """
    torch.manual_seed(0)
    tokenizer = train_tokenizer(paragraphs, 300)
    lm = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=32,
            initializer_range=0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(folder, lm, tokenizer)
    return folder


@pytest.fixture
def tiny(model_folder):
    lm, tokenizer = load_model(model_folder)
    return lm.eval(), tokenizer
