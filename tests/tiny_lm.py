"""A causal language model as transformers shapes it, small enough for ranks to make in no time."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Hidden(NamedTuple):
    last_hidden_state: Tensor


class Output(NamedTuple):
    logits: Tensor


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):  # [B, T, d]
        return x + self.linear(x.cumsum(1)).tanh()  # a token sees those before it


class Body(nn.Module):
    def __init__(self, vocab_size, width):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList([Layer(width)])
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x)
        return Hidden(self.norm(x))


class TinyLM(nn.Module):
    def __init__(self, vocab_size=23, width=8, bias=True):
        super().__init__()
        self.model = Body(vocab_size, width)
        self.lm_head = nn.Linear(width, vocab_size, bias=bias)

    def forward(self, ids):
        return Output(self.lm_head(self.model(ids).last_hidden_state))


def policy_and_reference(**sizes):
    """Float64; the reference is not far off."""
    torch.manual_seed(0)
    policy = TinyLM(**sizes).double()
    torch.manual_seed(0)
    reference = TinyLM(**sizes).double().requires_grad_(False)
    for weight in reference.parameters():
        weight.add_(0.1 * torch.randn_like(weight))
    return policy, reference
