"""Prompts: text or chats from a file, or starts of the corpus's paragraphs, and their tokens.

A text file has one prompt per line. A file whose name ends in .jsonl has one chat per line,

    {"messages": [{"role": "user", "content": "What is a class?"}]}

which the tokenizer's chat template turns into a prompt for the assistant's next message.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, Any]]
Prompt = str | Chat

HINT = (
    "hint: this model has a chat template, which prompts of plain text are not put into; for "
    "chats, give --prompts a .jsonl file with messages"
)


def read_prompts(path: str) -> list[Prompt]:
    """Read the prompts of a file; lines without text are left out.

    Raises:
        ValueError: the file cannot be read, holds no prompt, or has a line that is none.
    """
    try:
        # splitlines would also split at characters that a text may hold (U+2028, form feed).
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts is {path!r}, which cannot be read: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ValueError(f"prompts is {path!r}, which holds no line of text; one is a prompt")
    if not path.endswith(".jsonl"):
        return [line for _, line in numbered]
    return [_chat(line, f"prompts is {path!r}, whose line {number}") for number, line in numbered]


def _chat(line: str, where: str) -> Chat:
    try:
        messages = json.loads(line)["messages"]
        roles = [message["role"] for message in messages]
    except (ValueError, KeyError, TypeError, RecursionError):
        roles = []
    if not roles or not all(isinstance(role, str) for role in roles):
        raise ValueError(
            f'{where} is no chat; it must read {{"messages": [{{"role": "user", "content": "..."}}]'
            "}"
        )
    if roles[-1] == "assistant":
        raise ValueError(
            f"{where} ends with a message of the assistant, whose message is what is sampled"
        )
    chat: Chat = messages
    return chat


def encode_prompts(
    prompts: list[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    *,
    path: str,  # to the file that they were read from
    context: int | None,  # tokens the model can read; None: as many as there are
    answer_tokens: int,
) -> list[list[int]]:
    """Encode the given prompts.

    Raises:
        ValueError: one of them has no tokens, does not fit into the context with its answer, or is
            a chat that the tokenizer cannot put into words.
    """
    room = _room_for_prompt(context, answer_tokens)
    encoded = [_encode(prompt, tokenizer, path) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded):
        if not ids:
            raise ValueError(f"{_quoted(prompt)} has no tokens; a prompt must have one or more")
        if room is not None and len(ids) > room:
            raise ValueError(
                f"{_quoted(prompt)} has {len(ids)} tokens; with {answer_tokens} for the answer, "
                f"the model's context of {context} has room for {room}; shorten it, or lower "
                "answer_tokens"
            )
    return encoded


def paragraph_starts(
    paragraphs: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    context: int | None,
    prompt_tokens: int,
    answer_tokens: int,
) -> list[list[int]]:
    """Encode the start of every paragraph that is longer than `prompt_tokens`.

    Raises:
        ValueError: no paragraph is, or a start does not fit into the context with its answer.
    """
    room = _room_for_prompt(context, answer_tokens)
    if room is not None and prompt_tokens > room:
        raise ValueError(
            f"prompt_tokens is {prompt_tokens}; with {answer_tokens} for the answer, "
            f"the model's context has room for {room}; lower prompt_tokens or answer_tokens"
        )
    encoded = [tokenizer(paragraph).input_ids for paragraph in paragraphs]
    starts = [ids[:prompt_tokens] for ids in encoded if len(ids) > prompt_tokens]
    if not starts:
        raise ValueError(
            f"prompt_tokens is {prompt_tokens}, and no paragraph of the corpus is longer; lower it"
        )
    return starts


def _room_for_prompt(context: int | None, answer_tokens: int) -> int | None:
    """Count the tokens that the context leaves for a prompt; None if it has no limit."""
    if not context:
        return None
    room = context - answer_tokens
    if room < 1:
        raise ValueError(
            f"answer_tokens is {answer_tokens}, but the model's context of {context} tokens "
            "must hold a prompt as well; lower answer_tokens"
        )
    return room


def _encode(prompt: Prompt, tokenizer: PreTrainedTokenizerBase, path: str) -> list[int]:
    if isinstance(prompt, str):
        text: list[int] = tokenizer(prompt).input_ids
        return text
    if not tokenizer.chat_template:
        raise ValueError(
            f"prompts is {path!r}, which holds chats, but the model's tokenizer has no "
            "chat template; give a text file, one prompt per line, or a model made for chats"
        )
    try:
        # The template writes the special tokens; added once more, they would be doubled.
        chat: list[int] = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program, which may raise anything
        raise ValueError(
            f"{_quoted(prompt)} does not fit the model's chat template: {error}"
        ) from error
    return chat


def _quoted(prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else str(prompt[-1].get("content"))
    return f"the prompt {text[:40]!r}"
