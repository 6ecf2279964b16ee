"""The policy: a causal LM with a value head, sampled from and scored so that both agree.

Sequences are `[prompt | answer]`, prompts padded on the left and answers on the right, so that all
answers start in the same column. Masks tell what is padding, never its token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from kl_kernels.lab.ppo.ranks import SINGLE_PROCESS, ExponentialRace, Ranks


@dataclass(frozen=True)
class Samples:
    """Prompts and sampled answers: B sequences of P + T tokens."""

    ids: Tensor  # [B, P + T]
    attention_mask: Tensor  # [B, P + T] bool, False at padding on either side
    mask: Tensor  # [B, T] bool, the answer through its first EOS

    @property
    def answers(self) -> Tensor:  # [B, T]
        return self.ids[:, -self.mask.shape[1] :]

    def map(self, f: Callable[[Tensor], Tensor]) -> Samples:
        return Samples(f(self.ids), f(self.attention_mask), f(self.mask))

    def select(self, rows: Tensor) -> Samples:  # [b] int64
        return self.map(lambda tensor: tensor[rows])


class Policy(nn.Module):
    """A causal LM and a value head on its detached last hidden states.

    The states are detached because the value loss would otherwise bend the language model; the head
    has a learning rate to itself. The policy is never in training mode: dropout would make the
    ratio of an unchanged policy differ from 1.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm
        width = lm.config.get_text_config().hidden_size
        output = nn.Linear(width, 1)
        nn.init.zeros_(output.weight)  # every value is 0 before the first return
        nn.init.zeros_(output.bias)
        self.value_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), output)
        self.eval()

    def forward(
        self,
        ids: Tensor,  # [B, P + T]
        attention_mask: Tensor,  # [B, P + T] bool
        n_answer: int,  # T
    ) -> tuple[Tensor, Tensor]:
        """Compute logits [B, T, V] and values [B, T], each before its answer token is drawn."""
        logits, hidden = causal_lm(self.lm, ids, attention_mask, n_answer)
        return logits, self.value_head(hidden.detach()).squeeze(-1)

    @property
    def device(self) -> torch.device:
        return self.lm.device

    def generate(self, ids: Tensor, **options: Any) -> Tensor:  # [B, P] -> [B, P + at most T]
        """Generate with the language model, through this module, which gathers sharded weights."""
        # A rank whose answers have ended goes on with the others, which need its shards.
        generated: Tensor = self.lm.generate(ids, synced_gpus=is_sharded(self), **options)
        return generated


def prepare(
    policy: Policy, optimizer: Optimizer, accelerator: Accelerator
) -> tuple[Policy, Optimizer]:
    """Wrap the policy for its ranks: as it is for one, in DDP, or sharded in place by FSDP2."""
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    if is_sharded(policy):
        register_fsdp_forward_method(policy, "generate")
    return wrapped, optimizer


def is_sharded(policy: nn.Module) -> bool:
    """Tell whether FSDP2 has spread the weights over the ranks."""
    return isinstance(policy, FSDPModule)


def causal_lm(
    lm: PreTrainedModel,
    ids: Tensor,  # [B, P + T]
    attention_mask: Tensor,  # [B, P + T] bool
    n_answer: int,  # T
) -> tuple[Tensor, Tensor]:
    """Compute logits [B, T, V] and last hidden states [B, T, H] before each answer token.

    Positions count unpadded tokens, so left padding changes nothing. The results are views.
    """
    output = lm(
        input_ids=ids,
        attention_mask=attention_mask.long(),
        position_ids=(attention_mask.long().cumsum(1) - 1).clamp_min(0),
        output_hidden_states=True,
        use_cache=False,
    )
    before = slice(-n_answer - 1, -1)
    return output.logits[:, before], output.hidden_states[-1][:, before]


def pad_left(
    prompts: list[list[int]], filler: int, device: torch.device
) -> tuple[Tensor, Tensor]:  # ids [B, P], mask [B, P] bool
    width = max(map(len, prompts))
    ids = torch.tensor([[filler] * (width - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    mask = torch.arange(width, device=device) >= width - lengths[:, None]
    return ids, mask


def through_first_eos(answers: Tensor, eos: int) -> Tensor:  # [B, T] -> [B, T] bool
    is_eos = (answers == eos).int()
    return is_eos.cumsum(1) - is_eos == 0


@torch.no_grad()
def sample(
    lm: PreTrainedModel | Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    n_answer: int,
    ranks: Ranks = SINGLE_PROCESS,
) -> Samples:
    """Draw one answer of at most `n_answer` tokens per prompt, from softmax(logits) itself.

    Each rank is given all prompts and answers its local rows of them. `generate` is told to decode
    greedily, which changes no logit. Told to sample, it would silently keep only the 50 likeliest
    tokens, and the loss's log-probabilities would be those of another distribution.
    """
    eos = tokenizer.eos_token_id
    filler = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    local = ranks.local_rows(len(prompts))
    prompt_ids, prompt_mask = (rows[local] for rows in pad_left(prompts, filler, lm.device))
    race = ExponentialRace(len(prompts), local)
    ids = lm.generate(
        prompt_ids,
        attention_mask=prompt_mask.long(),
        logits_processor=LogitsProcessorList([race]),
        do_sample=False,
        max_new_tokens=n_answer,
        eos_token_id=eos,
        pad_token_id=filler,
    )
    ids = F.pad(ids, (0, race.catch_up(ranks)), value=filler)
    mask = through_first_eos(ids[:, prompt_ids.shape[1] :], eos)
    return Samples(ids, torch.cat((prompt_mask, mask), 1), mask)


def prompt_texts(prompts: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]


def answer_texts(samples: Samples, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Decode the answers, without special tokens and without what follows the first EOS."""
    return [
        tokenizer.decode(ids[mask], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for ids, mask in zip(samples.answers, samples.mask)
    ]
