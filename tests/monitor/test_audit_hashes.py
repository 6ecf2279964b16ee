"""Model and folder hashes: alike for the same weights, other for others."""

import hashlib
import json

import pytest
import torch
from torch import nn

from kl_kernels.monitor.hashes import folder_hash, model_hash


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(3, 4, generator=generator),
        "b": torch.randn(5, generator=generator).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }


def test_it_is_the_hash_of_names_dtypes_shapes_and_bytes():
    digest = hashlib.sha256(b"\x00\x00\x80\x3f\x00\x00\x00\xc0").hexdigest()
    text = json.dumps({"w": ["float32", [1, 2], digest]}, separators=(",", ":"))
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert model_hash({"w": torch.tensor([[1.0, -2.0]])}) == expected


def test_order_strides_and_storage_do_not_count():
    state = tensors()
    expected = model_hash(state)
    assert model_hash(dict(reversed(state.items()))) == expected
    state["a"] = state["a"].t().contiguous().t()
    assert model_hash(state) == expected
    state["a"] = torch.cat([state["a"], state["a"]])[3:]
    assert model_hash(state) == expected
    state["b"] = torch.stack([state["b"], state["b"]], dim=1)[:, 0]
    assert model_hash(state) == expected
    state["a"] = nn.Parameter(state["a"])
    assert model_hash(state) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(c=s.pop("a")),
        lambda s: s.update(a=s["a"].reshape(4, 3)),
        lambda s: s.update(a=s["a"].view(torch.int32)),
        lambda s: s.update(empty=torch.zeros(3, 0)),
        lambda s: s.pop("empty"),
        lambda s: s["b"].view(torch.int16)[0].bitwise_xor_(1),
        lambda s: s.update(a=s["b"], b=s["a"]),
        lambda s: s["flags"].logical_not_(),
    ],
)
def test_any_change_of_content_counts(change):
    state = tensors()
    before = model_hash(state)
    change(state)
    assert model_hash(state) != before


def test_a_module_is_its_state_dict():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert model_hash(module) == model_hash(module.state_dict())
    before = model_hash(module)
    with torch.no_grad():
        module[1].running_mean[0] = 1
    assert model_hash(module) != before


@pytest.mark.parametrize(
    "entry", [3, torch.zeros(2, device="meta"), torch.zeros(2).to_sparse(), "text"]
)
def test_what_has_no_bytes_is_refused_by_name(entry):
    with pytest.raises(TypeError, match="'bad' is a "):
        model_hash({"good": torch.zeros(1), "bad": entry})


def test_a_folder_is_its_names_and_contents(tmp_path):
    def folder(name, files):
        for path, content in files.items():
            file = tmp_path / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return folder_hash(tmp_path / name)

    files = {"a.bin": b"1", "sub/b.bin": b"22"}
    first = folder("first", files)
    assert folder("second", dict(reversed(files.items()))) == first
    others = [
        {**files, "a.bin": b"2"},
        {"c.bin": b"1", "sub/b.bin": b"22"},
        {"a.bin": b"12", "sub/b.bin": b"2"},
        {**files, "c": b""},
    ]
    hashes = {folder(f"other{i}", other) for i, other in enumerate(others)}
    assert len(hashes | {first}) == 1 + len(others)


def test_a_folder_without_files_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="it must be a folder with files in it"):
            folder_hash(path)
