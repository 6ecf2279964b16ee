"""A model keeps the dtype it has in its folder, or is refused with advice."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from micro import MICRO, run
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kl_kernels.lab.ppo.checkpoint import load_state, save_model
from kl_kernels.lab.ppo.model import check_model_folder, load_model, weights_dtypes

REWARD = "def length(prompts, answers):\n    return [len(a) / 10 for a in answers]\n"


@pytest.fixture
def folder(model_folder, tmp_path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def reward(tmp_path, monkeypatch) -> list[str]:
    (tmp_path / "of_length.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    return ["--reward", "of_length:length"]


def recast(folder: Path, *dtypes: torch.dtype) -> None:
    """Cast the folder's weights to the first dtype, but for one to each of the others."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for i, name in enumerate(weights):
        weights[name] = weights[name].to(dtypes[i if i < len(dtypes) else 0])
    save_file(weights, path, {"format": "pt"})


def dtypes_in(folder: Path) -> set[torch.dtype]:
    return {weight.dtype for weight in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_trained_in_float32_and_saved_as_it_came(
    folder, tmp_path, reward, dtype, capsys
):
    """The dtype survives a run, a resumed run, and a run that starts from the saved policy."""
    recast(folder, dtype)
    name = str(dtype).removeprefix("torch.")
    said = f"the model's {name} weights are trained in float32 and saved as {name}\n"
    out, again = tmp_path / "run", tmp_path / "again"
    assert run(*MICRO, *reward, "--model", folder, "--updates", "1", "--out", out) == 0
    assert capsys.readouterr().out.count(said) == 1
    assert dtypes_in(out / "policy") == {dtype}
    assert run("--resume", out, "--updates", "2") == 0
    assert capsys.readouterr().out.count(said) == 1
    assert dtypes_in(out / "policy") == {dtype}
    assert AutoConfig.from_pretrained(out / "policy").dtype == dtype
    assert AutoModelForCausalLM.from_pretrained(out / "policy", dtype="auto").dtype == dtype
    assert run(*MICRO, *reward, "--model", out / "policy", "--updates", "1", "--out", again) == 0
    assert capsys.readouterr().out.count(said) == 1
    assert dtypes_in(again / "policy") == {dtype}

    # Training goes on from float32 weights; the saved policy is those, rounded once.
    trained = load_state(out / "checkpoint.pt")["policy"]
    assert {w.dtype for w in trained.values()} == {torch.float32}
    saved = load_file(out / "policy" / "model.safetensors")
    assert not torch.equal(
        saved["transformer.wte.weight"].float(), trained["lm.transformer.wte.weight"]
    ) or (dtype == torch.float64)
    for key, weight in saved.items():
        assert torch.equal(weight, trained["lm." + key].to(dtype)), key


def test_a_float32_model_is_nothing_to_speak_of(folder, tmp_path, reward, capsys):
    assert run(*MICRO, *reward, "--model", folder, "--updates", "1", "--out", tmp_path / "run") == 0
    assert "are trained in" not in capsys.readouterr().out
    assert dtypes_in(tmp_path / "run" / "policy") == {torch.float32}


def test_a_model_of_several_dtypes_is_saved_in_float32_and_says_so(
    folder, tmp_path, reward, capsys
):
    recast(folder, torch.bfloat16, torch.float32)
    assert run(*MICRO, *reward, "--model", folder, "--updates", "1", "--out", tmp_path / "run") == 0
    said = "the model's float32 and bfloat16 weights are trained in float32 and saved as float32\n"
    assert said in capsys.readouterr().out
    assert dtypes_in(tmp_path / "run" / "policy") == {torch.float32}


def test_the_files_decide_what_the_dtype_is_and_not_the_configuration(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    assert weights_dtypes(folder) == [torch.float32]
    assert load_model(folder)[0].dtype == torch.float32


def test_the_weights_of_a_model_in_several_files_are_all_looked_at(tiny, tmp_path):
    lm, tokenizer = tiny
    save_model(tmp_path / "model", lm, tokenizer, dtype=torch.float16)
    (tmp_path / "model" / "model.safetensors").unlink()
    lm.to(torch.float16).save_pretrained(tmp_path / "model", max_shard_size="5KB")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 1
    assert weights_dtypes(tmp_path / "model") == [torch.float16]
    save_file(
        {k: v.float() for k, v in load_file(shards[-1]).items()}, shards[-1], {"format": "pt"}
    )
    save_file({"unused": torch.zeros(1, dtype=torch.float64)}, tmp_path / "model" / "x.safetensors")
    assert weights_dtypes(tmp_path / "model") == [torch.float32, torch.float16]
    assert load_model(tmp_path / "model")[0].dtype == torch.float32


def test_tied_weights_are_saved_once_in_any_dtype(tmp_path, tiny):
    lm, tokenizer = tiny
    assert lm.lm_head.weight is lm.transformer.wte.weight
    for dtype in (torch.float32, torch.bfloat16):
        save_model(tmp_path / "saved", lm, tokenizer, dtype=dtype)
        weights = load_file(tmp_path / "saved" / "model.safetensors")
        assert "lm_head.weight" not in weights
        assert weights["transformer.wte.weight"].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_quantised_model_is_refused(folder, dtype):
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"] = torch.zeros(16, 64).to(dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"^model is .*weights of type (I8|F8_E4M3); accepted: F64"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("Qwen/Qwen2-0.5B", "hf download Qwen/Qwen2-0.5B --local-dir Qwen2-0.5B,"),
        (
            "https://huggingface.co/Qwen/Qwen2-0.5B",
            "hf download Qwen/Qwen2-0.5B --local-dir Qwen2-",
        ),
        ("gpt2", "hf download gpt2 --local-dir gpt2, and then --model gpt2"),
    ],
)
def test_a_name_on_the_hub_gets_the_line_that_downloads_it(tmp_path, monkeypatch, name, line):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^model is '{name}'; there is no such folder") as error:
        run("--model", name, "--out", tmp_path / "run")
    assert line in str(error.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./model", "no/such/folder", "../model", "~/m"]
)
def test_a_path_is_no_name_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"there is no such folder$"):
        check_model_folder(name)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny, tmp_path):
    lm, tokenizer = tiny
    rows = lm.get_input_embeddings().num_embeddings
    assert tokenizer.add_tokens(["<a>", "<b>"]) == 2
    save_model(tmp_path / "model", lm, tokenizer)
    with pytest.raises(ValueError, match=rf"token ids up to {rows + 1}, but .* has {rows} rows"):
        run("--model", tmp_path / "model", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    lm.resize_token_embeddings(rows + 2)  # as the message says
    save_model(tmp_path / "model", lm, tokenizer)
    load_model(tmp_path / "model")


def test_an_embedding_larger_than_the_tokenizer_is_trained(tiny, tmp_path, reward):
    """Many models have such an embedding; a token without a text is sampled like any other."""
    lm, tokenizer = tiny
    lm.resize_token_embeddings(len(tokenizer) + 200)
    save_model(tmp_path / "model", lm, tokenizer)
    arguments = ["--model", tmp_path / "model", "--out", tmp_path / "run"]
    assert run(*MICRO, *reward, *arguments, "--updates", "2") == 0


def without(folder: Path, *tokens: str) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in tokens}))


def test_a_tokenizer_without_an_eos_token_is_refused_at_once(folder, tmp_path):
    without(folder, "eos_token")
    with pytest.raises(
        ValueError, match=r"has no EOS token.*set eos_token in its tokenizer_config"
    ):
        run("--model", folder, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_a_padding_token_trains_as_one_with_it(folder, tmp_path, reward):
    common = [*MICRO, *reward, "--updates", "2"]
    assert run(*common, "--model", folder, "--out", tmp_path / "with") == 0
    without(folder, "pad_token")
    assert load_model(folder)[1].pad_token_id is None
    assert run(*common, "--model", folder, "--out", tmp_path / "without") == 0
    states = [load_state(tmp_path / name / "checkpoint.pt") for name in ("with", "without")]
    torch.testing.assert_close(states[0]["policy"], states[1]["policy"], rtol=1e-4, atol=1e-6)
