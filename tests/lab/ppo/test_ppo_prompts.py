"""Prompts are read as they stand, chats as the tokenizer's template writes them, or refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from micro import MICRO, run
from tokenizers.processors import TemplateProcessing

from kl_kernels.lab.ppo import command
from kl_kernels.lab.ppo.model import load_model
from kl_kernels.lab.ppo.prompts import HINT, encode_prompts, read_prompts
from kl_kernels.lab.ppo.report import read_metrics

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def chat_folder(model_folder, tmp_path) -> Path:
    folder = Path(shutil.copytree(model_folder, tmp_path / "chat-model"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Arguments of a reward that keeps the prompts it is given."""
    (tmp_path / "seeing.py").write_text(
        "prompts_seen = []\n"
        "def see(prompts, answers):\n"
        "    prompts_seen.extend(prompts)\n"
        "    return [len(a) / 10 for a in answers]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield ["--reward", "seeing:see"]
    sys.modules.pop("seeing", None)


def jsonl(path: Path, *chats: list[tuple[str, str]]) -> Path:
    lines = (
        json.dumps({"messages": [{"role": r, "content": c} for r, c in chat]}) for chat in chats
    )
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_chat_becomes_what_the_template_writes_and_the_model_answers_it(
    chat_folder, tmp_path, seen, capsys
):
    prompts = jsonl(tmp_path / "p.jsonl", [("user", "x")], [("system", "y"), ("user", "z")])
    out = tmp_path / "run"
    arguments = ["--model", chat_folder, "--prompts", prompts, "--out", out]
    assert run(*MICRO, *seen, *arguments, "--updates", "2", "--answer-tokens", "2") == 0
    assert set(sys.modules["seeing"].prompts_seen) == {
        "[user]x[assistant]",
        "[system]y[user]z[assistant]",
    }
    assert HINT not in capsys.readouterr().out
    assert len(read_metrics(out / "metrics.jsonl")) == 2
    assert run("--resume", out, "--updates", "3") == 0
    assert "chat_template" in str(list((out / "policy").iterdir())), "the policy answers chats, too"


def test_a_chat_s_special_tokens_are_the_template_s_alone(chat_folder):
    tokenizer = load_model(chat_folder)[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    assert tokenizer("ab").input_ids[0] == tokenizer.eos_token_id, "it adds one to plain text"
    chat = [{"role": "user", "content": "ab"}]
    (ids,) = encode_prompts([chat], tokenizer, path="", context=None, answer_tokens=6)
    expected = tokenizer("[user]ab<eos>[assistant]", add_special_tokens=False).input_ids
    assert ids == expected
    assert ids.count(tokenizer.eos_token_id) == 1


def test_plain_text_stays_plain_and_a_chat_model_hints_at_its_template(
    chat_folder, tmp_path, seen, capsys
):
    (tmp_path / "p.txt").write_text("ab\n")
    arguments = ["--model", chat_folder, "--prompts", tmp_path / "p.txt", "--updates", "1"]
    assert run(*MICRO, *seen, *arguments, "--out", tmp_path / "run") == 0
    assert set(sys.modules["seeing"].prompts_seen) == {"ab"}
    assert capsys.readouterr().out.count(HINT) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "line 2 is no chat"),
        ("{}", "line 2 is no chat"),
        ("[]", "line 2 is no chat"),
        ("5", "line 2 is no chat"),
        ('{"messages": []}', "line 2 is no chat"),
        ('{"messages": null}', "line 2 is no chat"),
        ('{"messages": "hello"}', "line 2 is no chat"),
        ('{"messages": [{"content": "x"}]}', "line 2 is no chat"),
        ('{"messages": [{"role": 5}]}', "line 2 is no chat"),
        ("[" * 100_000, "line 2 is no chat"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "ends with a message of the"),
    ],
)
def test_a_line_that_is_no_chat_is_named(chat_folder, tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=rf"^prompts is '.*p.jsonl', whose .*{message}"):
        run("--model", chat_folder, "--prompts", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [True, False])
def test_chats_need_a_template(model_folder, tmp_path, given):
    path = jsonl(tmp_path / "p.jsonl", [("user", "x")])
    model = ["--model", model_folder] if given else []
    with pytest.raises(ValueError, match="tokenizer has no chat template; give a text file"):
        run(*MICRO, *model, "--prompts", path, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_chat_that_the_template_refuses_is_named(chat_folder, tmp_path):
    path = jsonl(tmp_path / "p.jsonl", [("user", "x")], [("user", "x"), ("system", "late")])
    with pytest.raises(ValueError, match=r"^the prompt 'late' does not fit .* system comes first"):
        run(*MICRO, "--model", chat_folder, "--prompts", path, "--out", tmp_path / "run")


@pytest.mark.parametrize("text", ["", "\n\n", "  \n\t\n", "\ufeff\n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_a_file_without_a_prompt_is_refused(tmp_path, text, name):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"^prompts is '.*', which holds no line of text"):
        run("--prompts", tmp_path / name, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_line_is_a_prompt_whatever_characters_it_holds(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa\u2028b\x0cc\r\n\r\n  d \n".encode())
    assert read_prompts(str(path)) == ["a\u2028b\x0cc", "  d "]


def test_a_prompt_without_tokens_is_named(tiny):
    class Silent:
        chat_template = None

        def __call__(self, text):
            return type("Encoding", (), {"input_ids": []})

    with pytest.raises(ValueError, match="the prompt 'a' has no tokens"):
        encode_prompts(["a"], Silent(), path="", context=None, answer_tokens=6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer-tokens", "32"], "answer_tokens is 32, but the model's context of 32 tokens"),
        (["--answer-tokens", "30"], "prompt_tokens is 3; with 30 for the answer, .* room for 2"),
        (["--prompt-tokens", "27"], "prompt_tokens is 27; with 6 for the answer, .* room for 26"),
    ],
)
def test_a_context_too_small_is_refused_at_once(tmp_path, model_folder, arguments, message):
    with pytest.raises(ValueError, match="^" + message):
        run(*MICRO, "--model", model_folder, *arguments, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_long_prompt_is_refused_before_a_model_is_pretrained_for_it(tmp_path, monkeypatch):
    monkeypatch.delattr(command, "pretrain")
    (tmp_path / "p.txt").write_text("xyz " * 100)
    with pytest.raises(ValueError, match=r"^the prompt 'xyz .* context of 64 has room for 58"):
        run(*MICRO, "--prompts", tmp_path / "p.txt", "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_prompts_longer_than_every_paragraph_are_refused(tmp_path):
    arguments = ["--context", "9000", "--prompt-tokens", "8000"]
    with pytest.raises(ValueError, match="prompt_tokens is 8000, and no paragraph"):
        run(*MICRO, *arguments, "--out", tmp_path / "run")


def test_a_model_of_any_context_takes_any_prompt(tiny):
    tokenizer = tiny[1]
    (ids,) = encode_prompts(["xyz " * 100], tokenizer, path="", context=None, answer_tokens=6)
    assert len(ids) > 100


def test_the_longest_prompt_that_fits_is_answered_in_full(tmp_path, model_folder, seen):
    """The prompt's 26 tokens and the answer's 6 are the 32 of the context."""
    tokenizer = load_model(model_folder)[1]
    text = tokenizer.decode(torch.arange(40, 66))
    assert len(tokenizer(text).input_ids) == 26
    (tmp_path / "p.txt").write_text(text)
    arguments = ["--model", model_folder, "--prompts", tmp_path / "p.txt", "--updates", "1"]
    assert run(*MICRO, *seen, *arguments, "--out", tmp_path / "run") == 0
