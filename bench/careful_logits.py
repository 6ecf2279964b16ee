"""Logits to count careful rows on: a small model with a large vocabulary, and what is made of them.

The model is trained on text that every CPython carries: its help texts and its library's sources.
"""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kl_kernels.ppo.checkpoint import RunFolder
from kl_kernels.ppo.config import PPOConfig
from kl_kernels.ppo.model import load_model
from kl_kernels.ppo.pretrain import new_model, pretrain, random_windows
from kl_kernels.ppo.task import load_corpus

# Llama 2's vocabulary. A step costs what the vocabulary costs, so the rest is small.
MODEL = PPOConfig(vocab_size=32000, hidden_size=128, layers=2, pretrain_steps=400,
                  pretrain_batch=8, context=64)  # fmt: skip
POLICY_STEPS, POLICY_LR = 60, 1e-3
HELD_OUT = 20  # every 20th text


@dataclass(frozen=True)
class Case:
    name: str
    logits: Tensor  # [R, V]
    ref_logits: Tensor  # [R, V]
    next_ids: Tensor  # [R], the text's own next tokens
    temperature: float = 1.0


def texts() -> tuple[list[str], list[str]]:
    """Prose and sources."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "site-packages", "idlelib", "encodings", "topics.py"}
    files = (p for p in sorted(library.rglob("*.py")) if not left_out.intersection(p.parts))
    sources = [p.read_text(errors="ignore") for p in files]
    return load_corpus(), [source for source in sources if source]


def trained_models(seed: int) -> tuple[PreTrainedModel, PreTrainedModel, PreTrainedTokenizerBase]:
    """A policy, the reference it was trained on from, and their tokenizer."""
    prose, sources = (training(t) for t in texts())
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        pretrain(PPOConfig(**{**MODEL.__dict__, "seed": seed}), prose + sources, run)
        reference, tokenizer = load_model(run.reference)
        policy, _ = load_model(run.reference)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), POLICY_LR)
    text = tokens_of(tokenizer, prose)
    for _ in range(POLICY_STEPS):
        windows = random_windows(text, MODEL.pretrain_batch, MODEL.context)
        optimizer.zero_grad()
        policy(input_ids=windows, labels=windows).loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MODEL.max_grad_norm)
        optimizer.step()
    return policy.eval(), reference.eval(), tokenizer


def training(of: list[str]) -> list[str]:
    return [text for i, text in enumerate(of) if i % HELD_OUT]


def held_out_windows(tokenizer: PreTrainedTokenizerBase, n_rows: int) -> Tensor:
    """Half of prose, half of sources, [n, context + 1]."""
    n = n_rows // MODEL.context // 2
    return torch.cat(
        [random_windows(tokens_of(tokenizer, t[::HELD_OUT]), n, MODEL.context + 1) for t in texts()]
    )


def tokens_of(tokenizer: PreTrainedTokenizerBase, of: list[str]) -> Tensor:
    return torch.tensor([token for text in of for token in tokenizer(text).input_ids])


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: Tensor) -> Tensor:  # -> [R, V]
    return model(input_ids=windows[:, :-1]).logits.flatten(0, 1).bfloat16()


def cases(
    policy: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    n_rows: int,
) -> Iterator[Case]:
    windows = held_out_windows(tokenizer, n_rows)
    x, y = logits_of(policy, windows), logits_of(reference, windows)
    ids = windows[:, 1:].flatten()
    yield Case("as they are", x, y, ids)
    untrained = [logits_of(new_model(MODEL, tokenizer), windows) for _ in range(2)]
    yield Case("untrained models", *untrained, ids)
    for temperature in (0.7, 1.3):
        yield Case(f"temperature {temperature}", x, y, ids, temperature)
    yield from padded(x, y, ids, untrained)
    for name, keep in (("top-k 50", top_k(x, 50)), ("top-p 0.95", top_p(x, 0.95))):
        yield Case(f"{name}, the rest -inf", *(without(t, keep) for t in (x, y)), ids)
    yield from widened(x, y, ids)


def padded(x: Tensor, y: Tensor, ids: Tensor, untrained: list[Tensor]) -> Iterator[Case]:
    """More columns than tokens: what trainers fill them with."""
    lowest = torch.finfo(x.dtype).min
    for n, name, fill in ((768, "-inf", -torch.inf), (4096, "-inf", -torch.inf),
                          (768, "finfo.min", lowest), (768, "0", 0.0)):  # fmt: skip
        filled = [torch.nn.functional.pad(t, (0, n), value=fill) for t in (x, y)]
        yield Case(f"{n} columns of {name}", *filled, ids)
    filled = [torch.cat([t, u[:, :768]], 1) for t, u in zip((x, y), untrained)]
    yield Case("768 columns of untrained embeddings", *filled, ids)


def widened(x: Tensor, y: Tensor, ids: Tensor) -> Iterator[Case]:
    """Four vocabularies beside each other, of which three hold unlikely tokens, in random order."""
    vocab_size = x.shape[1]
    columns = torch.cat([torch.arange(vocab_size), *(torch.randperm(vocab_size) for _ in range(3))])
    shift = torch.tensor([0.0, 6.0, 6.0, 6.0]).repeat_interleave(vocab_size)
    in_order = torch.arange(4 * vocab_size)
    orders = {
        "likely tokens first": in_order,
        "likely tokens last": in_order.roll(-vocab_size),
        "shuffled": torch.randperm(4 * vocab_size),
    }
    for name, order in orders.items():
        wide = [(t[:, columns[order]] - shift[order]).bfloat16() for t in (x, y)]
        place = order.argsort()  # the first vocabulary's are the likely tokens
        yield Case(f"four vocabularies, {name}", *wide, place[ids])
    wide = [(t[:, columns] - shift).bfloat16() for t in (x, y)]
    for t in wide:
        t[:, -256:] = -torch.inf
    yield Case("four vocabularies, 256 columns of -inf", *wide, ids)


def top_k(x: Tensor, k: int) -> Tensor:  # -> bool [R, V]
    return x >= x.topk(k).values[:, -1:]


def top_p(x: Tensor, p: float) -> Tensor:  # -> bool [R, V]
    values, order = x.float().softmax(-1).sort(descending=True)
    kept = values.cumsum(-1) - values < p
    return torch.zeros_like(kept).scatter(1, order, kept)


def without(x: Tensor, keep: Tensor) -> Tensor:
    return x.masked_fill(~keep, -torch.inf)
