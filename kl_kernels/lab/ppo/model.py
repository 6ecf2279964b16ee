"""A causal LM and its tokenizer, loaded only from a folder on disk, and checked before a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

# By default, transformers asks on the terminal whether to run a folder's code.
FROM_DISK_ALONE = {"local_files_only": True, "trust_remote_code": False}

HUB = re.compile(r"(?:https://huggingface\.co/)?([\w-][\w.-]*(?:/[\w-][\w.-]*)?)/?")

# Names of dtypes in a safetensors header. Its other types of numbers are quantised.
TRAINABLE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def check_model_folder(folder: str) -> None:
    """Check that weights are in the folder itself, in a format that cannot run code.

    Raises:
        ValueError: they are not, or it is no model's folder.
    """
    path = Path(folder)
    if not path.exists():
        raise ValueError(f"model is {folder!r}; there is no such folder{_download_hint(folder)}")
    if not (path / "config.json").is_file():
        raise ValueError(
            f"model is {folder!r}; it must be a folder with a Hugging Face causal LM "
            "(config.json and weights) and its tokenizer"
        )
    if not any(path.glob("*.safetensors")):
        raise ValueError(
            f"model is {folder!r}, which has no weights in *.safetensors; formats that are "
            "unpickled, as pytorch_model.bin is, do not load"
        )
    if (path / "adapter_config.json").exists():
        raise ValueError(
            f"model is {folder!r}, which holds an adapter of a model that may be anywhere; merge "
            "it into that model, and save the sum"
        )
    try:
        elsewhere = [name for name in _indexed_files(path) if name != Path(name).name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"model is {folder!r}, whose {SAFE_WEIGHTS_INDEX_NAME} is not usable"
        ) from error
    if elsewhere:
        raise ValueError(
            f"model is {folder!r}, whose {SAFE_WEIGHTS_INDEX_NAME} has weights in "
            f"{elsewhere[0]!r}; they must be in the folder"
        )


def _indexed_files(path: Path) -> list[Any]:
    """List the weights' files from the index of a model that has several; [] without one."""
    index = path / SAFE_WEIGHTS_INDEX_NAME
    return list(json.loads(index.read_bytes())["weight_map"].values()) if index.exists() else []


def _download_hint(name: str) -> str:
    """Write the command that downloads `name`, if that may be a model of the Hugging Face Hub."""
    found = HUB.fullmatch(name)
    if not found:
        return ""
    hub_id = found[1]
    folder = hub_id.rpartition("/")[2]
    return (
        ", and models are loaded from folders alone, never from the network. If it is one of the "
        f"Hugging Face Hub: hf download {hub_id} --local-dir {folder}, and then --model {folder}"
    )


def load_model(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM, in float32, and its tokenizer.

    Raises:
        ValueError: the folder does not hold a causal LM in safetensors and a tokenizer whose tokens
            the model has, EOS among them; or the model is quantised; or asks for code of its own.
    """
    check_model_folder(str(folder))
    weights_dtypes(folder)
    try:
        lm = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            use_safetensors=True,
            # None leaves it to transformers: a folder may name a kernel to be fetched from the hub
            attn_implementation=None,
            **FROM_DISK_ALONE,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **FROM_DISK_ALONE)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"model is {str(folder)!r}, which does not load: {error}") from error
    _check_tokenizer(str(folder), lm, tokenizer)
    # A folder may bring its own settings (top-k, repetition penalty, ...). Sampling from anything
    # but softmax(logits) makes log-ratios wrong, and rewards the policy for diverging.
    lm.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return lm, tokenizer


def _check_tokenizer(folder: str, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder!r} has no EOS token, so answers cannot end; set eos_token "
            "in its tokenizer_config.json to the token that ends a text"
        )
    # A padding token is not needed: masks tell what is padding.
    last, rows = max(tokenizer.get_vocab().values()), lm.get_input_embeddings().num_embeddings
    if last >= rows:
        raise ValueError(
            f"the tokenizer in {folder!r} has token ids up to {last}, but the model's embedding "
            f"has {rows} rows; use the tokenizer the model was trained with, or save the model "
            f"after model.resize_token_embeddings({last + 1})"
        )


def weights_dtypes(folder: str | Path) -> list[torch.dtype]:
    """List the dtypes of the weights in a model's folder, as its files have them.

    config.json may name another one.

    Raises:
        ValueError: the weights cannot be read, or are quantised.
    """
    path, names = Path(folder), set[str]()
    one_file = (path / SAFE_WEIGHTS_NAME).exists()  # transformers then reads no index
    try:
        for name in [SAFE_WEIGHTS_NAME] if one_file else set(_indexed_files(path)):
            with safe_open(path / name, "pt") as file:
                names |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"model is {str(folder)!r}, which does not load: {error}") from error
    quantised = sorted(name for name in names - TRAINABLE.keys() if name != "BOOL")
    if quantised:
        raise ValueError(
            f"model is {str(folder)!r}, which has weights of type {', '.join(quantised)}; "
            f"accepted: {', '.join(TRAINABLE)} (of a quantised model, train the one it was made of)"
        )
    return [dtype for name, dtype in TRAINABLE.items() if name in names]


def saved_dtype(dtypes: list[torch.dtype]) -> torch.dtype:
    """Choose the dtype to save a trained model in: that of its files, if they share one."""
    return dtypes[0] if len(dtypes) == 1 else torch.float32


def dtype_note(dtypes: list[torch.dtype]) -> str | None:
    """Write a note on the dtype for the user; None where training changes nothing."""
    if dtypes == [torch.float32]:
        return None
    loaded, saved = (
        " and ".join(str(dtype).removeprefix("torch.") for dtype in some)
        for some in (dtypes, [saved_dtype(dtypes)])
    )
    return f"the model's {loaded} weights are trained in float32 and saved as {saved}"
