"""In the documents, every link leads somewhere, every Python block runs, every name is there."""

import copy
import pkgutil
import re
from dataclasses import make_dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from markdown_it import MarkdownIt
from transformers import LlamaConfig, LlamaForCausalLM

import kl_kernels

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").rglob("*.md"))
AT_ROOT = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "examples/README.md")
PAGES = [*(ROOT / page for page in AT_ROOT), *DOCS]
ELSEWHERE = ("http://", "https://", "mailto:")
API = re.compile(r"^::: (\S+)", re.MULTILINE)  # replaced by mkdocstrings


def parsed(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text())


def blocks(page):
    return [t for t in parsed(page) if t.type == "fence" and t.info.split()[:1] == ["python"]]


def targets(page):
    """Yield the targets of links and images."""
    for token in parsed(page):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if target and not target.startswith(ELSEWHERE):
                yield target


def anchors(page):
    """Yield the anchors of headings, as GitHub and MkDocs name them, and of the API."""
    tokens = parsed(page)
    for opening, heading in pairwise(tokens):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children)
            yield re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
    yield from API.findall(page.read_text())


def names():
    """Make tiny versions of the names that the documents' code takes as given."""
    torch.manual_seed(0)
    b, prompt, t, v = 4, 3, 8, 32
    size = {"vocab_size": v, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    policy = LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=2))
    logits, ref_logits = torch.randn(b, t, v, requires_grad=True), torch.randn(b, t, v)
    token_ids, mask = torch.randint(v, (b, t)), torch.arange(t) < torch.tensor([[8], [5], [1], [0]])
    scores, beta = torch.randn(b), 0.1
    rollout = kl_kernels.kl_rewards(logits, ref_logits, token_ids, scores, mask, kl_coef=beta)
    advantages = torch.randn(b, t)
    _, metrics = kl_kernels.fused_policy_loss(
        logits, token_ids, rollout.logprob, advantages, mask, ref_logits=ref_logits
    )
    return {
        "torch": torch, "kl_kernels": kl_kernels,
        "policy": policy, "lm": policy, "reference": copy.deepcopy(policy).requires_grad_(False),
        "optimizer": torch.optim.SGD(policy.parameters(), lr=0.1),
        "tokenizer": SimpleNamespace(decode=str), "config": make_dataclass("Config", [])(),
        "ids": torch.randint(v, (b, prompt + t)), "prompt_length": prompt, "prompt_ids": range(b),
        "logits": logits, "ref_logits": ref_logits, "token_ids": token_ids, "mask": mask,
        "scores": scores, "group_size": 2, "reward": scores, "beta": beta, "step": 1, "norm": 1.0,
        "rollout": rollout, "kl": rollout.kl, "entropy": rollout.entropy,
        "logprob": rollout.logprob,
        "old_logprobs": rollout.logprob.detach(), "ref_logprob": rollout.ref_logprob,
        "advantages": advantages, "values": torch.randn(b, t), "ratio": torch.ones(b, t),
        "metrics": metrics, "aggregation": "token-mean",
    }  # fmt: skip


def of_root(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=of_root)
def test_links_lead_to_files_and_headings(page):
    for target in targets(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)], ids=of_root)
def test_python_blocks_run_one_after_the_other(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    namespace = names()
    for block in blocks(page):
        source = "\n" * (block.map[0] + 1) + block.content  # a traceback then shows the page's line
        exec(compile(source, str(page), "exec"), namespace)


def test_the_menu_lists_every_page_once():
    def pages(entry):
        if isinstance(entry, str):
            return [entry]
        entries = entry.values() if isinstance(entry, dict) else entry
        return [page for inner in entries for page in pages(inner)]

    text = (ROOT / "mkdocs.yml").read_text().replace("!ENV ", "")  # a tag of mkdocs's own
    menu = pages(yaml.safe_load(text)["nav"])
    assert sorted(menu) == sorted(str(page.relative_to(ROOT / "docs")) for page in DOCS)


def test_the_api_pages_name_what_is_there_and_all_that_is_public():
    named = [name for page in DOCS for name in API.findall(page.read_text())]
    for name in named:
        pkgutil.resolve_name(name)
    public = set(kl_kernels.__all__) - {"__version__"}
    assert public <= {name.rpartition(".")[2] for name in named}


def test_snippets_are_of_files_that_are_there():
    for page in DOCS:
        for path, _, section in re.findall(r'^--8<-- "([^":]+)(:(\w+))?"', page.read_text(), re.M):
            text = (ROOT / path).read_text()
            assert not section or f"--8<-- [start:{section}]" in text, (page, section)


OURS = r"`((?:tests|kl_kernels|bench|csrc|docs|examples)/[^`\s{}<>]*)`"


@pytest.mark.parametrize("page", PAGES, ids=of_root)
def test_paths_in_the_text_are_there(page):
    """`tests/rl/` and `tests/algebra/test_properties*.py` are paths; `{a,b}` is left out."""
    for path in re.findall(OURS, page.read_text()):
        assert list(ROOT.glob(path.rstrip("/"))), path
