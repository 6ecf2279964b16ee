"""Hashes of models and of folders, for the header of an audit log."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def model_hash(model: nn.Module | Mapping[str, Any]) -> str:
    """SHA-256 of a module's state dict (or of a state dict): 64 hexadecimal digits.

    It is that of the canonical JSON of {name: [dtype, shape, SHA-256 of the bytes]}, row-major and
    little-endian. The same on any device and whatever the strides; another when a tensor is
    renamed, reshaped, cast or changed in one bit. A wrapper that renames (DDP puts "module." in
    front) changes it; hash what is wrapped. Buffers that are not saved do not count.

    Raises:
        TypeError: an entry is not a tensor, or has no bytes here (meta, sparse, sharded).
    """
    tensors = model.state_dict() if isinstance(model, nn.Module) else model
    return _hash_of({name: _tensor_facts(name, tensor) for name, tensor in tensors.items()})


def folder_hash(path: str | Path) -> str:
    """SHA-256 of the files in a folder and below: names and contents.

    It is that of the canonical JSON of {path in the folder: SHA-256 of the file}.

    Raises:
        ValueError: `path` is not a folder, or holds no file.
    """
    folder = Path(path)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    if not files:
        raise ValueError(f"path is '{path}'; it must be a folder with files in it")
    return _hash_of({file.relative_to(folder).as_posix(): _file_hash(file) for file in files})


def _hash_of(facts: Mapping[str, Any]) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _tensor_facts(name: str, tensor: object) -> list[Any]:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name!r} is a {type(tensor).__name__}; it must be a torch.Tensor")
    values = tensor.detach()
    if type(values) is not Tensor or values.layout != torch.strided or values.is_meta:
        raise TypeError(
            f"{name!r} is a {type(values).__name__} ({values.layout}, {values.device}); it must "
            "be a dense tensor with all of its values in this process"
        )
    values = values.cpu().resolve_conj().resolve_neg().contiguous()
    # Through uint8: numpy has no bfloat16. A 0-dim tensor has no bytes to be seen as.
    data = values.reshape(-1).view(torch.uint8).numpy()
    digest = hashlib.sha256(data.data).hexdigest()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), digest]


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
