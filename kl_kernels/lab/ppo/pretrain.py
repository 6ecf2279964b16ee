"""The tiny language model that the embedded task starts from: its tokenizer and pretraining."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kl_kernels.lab.ppo.checkpoint import (
    RunFolder,
    load_state,
    restore_rng,
    rng_state,
    save_model,
    save_state,
)

# PAD and EOS differ, so that an answer's end can be told from what fills its row.
PAD, EOS = "<pad>", "<eos>"

STEPS_PER_CHECKPOINT = 25


def train_tokenizer(paragraphs: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Fit byte-level BPE, whose decoding gives back every text, whatever its characters."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(paragraphs, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=EOS)


def new_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, layers: int, context: int
) -> LlamaForCausalLM:
    """Make a Llama with tied embeddings and feed-forward layers 8/3 as wide (Shazeer, 2020)."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=math.ceil(hidden_size / 12) * 32,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@dataclass(frozen=True)
class PretrainConstants:
    """Constants of `pretrain`, as `PPOConfig` has them."""

    seed: int
    vocab_size: int
    hidden_size: int
    layers: int
    context: int
    pretrain_steps: int
    pretrain_batch: int
    pretrain_lr: float
    max_grad_norm: float


def pretrain(constants: PretrainConstants, paragraphs: list[str], run: RunFolder) -> None:
    """Leave a language model of `paragraphs` in `run.reference`, going on where one was stopped."""
    torch.manual_seed(constants.seed)
    tokenizer = train_tokenizer(paragraphs, constants.vocab_size)
    text = torch.tensor(
        [token for p in paragraphs for token in [*tokenizer(p).input_ids, tokenizer.eos_token_id]]
    )
    lm = new_model(
        tokenizer,
        hidden_size=constants.hidden_size,
        layers=constants.layers,
        context=constants.context,
    ).train()
    optimizer = torch.optim.AdamW(lm.parameters(), constants.pretrain_lr)
    print(f"pretraining a Llama of {lm.num_parameters():,} parameters on {len(text):,} tokens")

    first = 0
    if run.pretraining.is_file():
        state = load_state(run.pretraining)
        lm.load_state_dict(state["lm"])
        optimizer.load_state_dict(state["optimizer"])
        restore_rng(state["rng"])
        first = state["step"]

    n_steps = constants.pretrain_steps
    progress = tqdm(
        range(first, n_steps), desc="pretraining", unit="step", initial=first, total=n_steps
    )
    for step in progress:
        optimizer.param_groups[0]["lr"] = constants.pretrain_lr * cosine(step, n_steps)
        windows = random_windows(text, constants.pretrain_batch, constants.context)
        loss = lm(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), constants.max_grad_norm)
        optimizer.step()
        progress.set_postfix_str(f"loss {loss.item():.2f}")
        if (step + 1) % STEPS_PER_CHECKPOINT == 0:
            save_state(
                run.pretraining,
                {
                    "lm": lm.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "rng": rng_state(),
                    "step": step + 1,
                },
            )
    save_model(run.reference, lm.eval(), tokenizer)
    run.pretraining.unlink(missing_ok=True)


def cosine(step: int, n_steps: int) -> float:
    """Follow half a cosine from 1 down to 0."""
    return 0.5 * (1 + math.cos(math.pi * step / n_steps))


def random_windows(text: Tensor, n: int, width: int) -> Tensor:  # [N] -> [n, width]
    starts = torch.randint(len(text) - width + 1, (n, 1))
    return text[starts + torch.arange(width)]
