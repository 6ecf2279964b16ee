"""Linear heads among a GPU's jobs, as far as they run without one."""

import json
import sys
from pathlib import Path

import pytest
import torch

from kl_kernels.lab.cost.ledger import Ledger
from kl_kernels.lab.documents import to_markdown

BENCH = Path(__file__).parents[2] / "bench"
JOBS = {  # products of the logits, of the gradient of hidden states, of that of the weight
    "statistics": (1, 0, 0), "exact KL": (2, 0, 0), "JSD": (4, 0, 0), "policy loss": (1, 0, 0),
    "statistics + gradients": (2, 1, 1), "exact KL + gradients": (4, 1, 1),
    "JSD + gradients": (6, 1, 1), "policy loss + gradients": (1, 1, 1),
    "statistics + gradient, frozen head": (2, 1, 0),
    "exact KL + gradient, frozen head": (4, 1, 0),
    "JSD + gradient, frozen head": (6, 1, 0), "policy loss + gradient, frozen head": (1, 1, 0),
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))


def test_every_job_is_a_case_at_many_rows_and_at_few(bench):
    from bench.gpu.heads import LLAMA, QWEN, cases
    from bench.peers.definitions import Size

    found = [(case.job, case.size) for case in cases()]
    assert len(found) == len(set(found))
    few = [Size(rows, 128256, 4096) for rows in (1, 64)]
    assert set(found) == {(job, size) for job in JOBS for size in (LLAMA, QWEN, *few)}
    assert all(case.dtype == torch.bfloat16 for case in cases())


@pytest.mark.parametrize("job", JOBS)
def test_the_ceiling_counts_the_products_that_ours_multiplies(bench, job):
    """On tensors without data, which take a GPU's path."""
    from bench.gpu.heads import PRODUCTS
    from bench.peers import linear
    from bench.peers.contenders import contenders
    from bench.peers.definitions import Size
    from bench.peers.heads import HeadInputs

    size = Size(512, 4096, 64)
    factors = [
        torch.empty(n, size.width, dtype=torch.bfloat16, device="meta")
        for n in (size.rows, size.vocab_size, size.rows, size.vocab_size)
    ]
    ids = torch.empty(size.rows, dtype=torch.int64, device="meta")
    x = HeadInputs(*factors, ids).wanting(linear.JOBS[job].gradients)
    of_tokens = torch.empty(4, 128, device="meta")
    known = {"old_logprobs": of_tokens, "ref_logprobs": of_tokens, "advantages": of_tokens[:, 0]}
    vars(x).update(known, mask=torch.ones(4, 128, dtype=torch.bool, device="meta"))
    call = contenders(linear.JOBS[job].operation)[0].ready()
    with Ledger() as ledger:
        call(x)
    products = [o for o in ledger.operations if o.flops]
    assert {o.operand_dtype for o in products} == {"bfloat16"}
    unit = 2 * size.rows * size.vocab_size * size.width
    assert PRODUCTS[job] == JOBS[job]
    assert sum(o.flops for o in products) == sum(JOBS[job]) * unit


def test_products_are_those_of_a_head(bench, monkeypatch):
    from bench.gpu import ceilings

    hidden, weight = torch.randn(5, 3), torch.randn(7, 3)
    made = {}

    class Once:
        def __init__(self, product):
            self.product = product

        def __call__(self):
            made[len(made)] = self.product(None).clone()
            return 1.0

    monkeypatch.setattr(ceilings, "replay", lambda product, *_: Once(product))
    assert ceilings.product_seconds(hidden, weight, turns=1) == dict.fromkeys(
        ("logits", "hidden", "weight"), 1.0
    )
    torch.testing.assert_close(made[0], hidden @ weight.T)
    torch.testing.assert_close(made[1], hidden @ weight.T @ weight)
    torch.testing.assert_close(made[2], (hidden @ weight.T).T @ hidden)


def test_the_heads_run_dry_and_become_a_page(bench, tmp_path, monkeypatch):
    from bench.gpu import heads

    command = ["heads", "--dry-run", "--commit", "abc", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    heads.main()
    results = json.loads((tmp_path / "heads_dry_run.json").read_text())
    assert results["commit"] == "abc"
    rows = results["measurements"]
    expected = {(job, 1) for job in JOBS} | {("policy loss + gradients", 70)}
    assert {(m["job"], m["rows"]) for m in rows} == expected
    for m in rows:
        assert m["share"] == pytest.approx(m["products_ms"] / m["median_ms"])
        assert ("call_us" in m) == ("replay_us" in m) == (m["rows"] == 1)
    text = to_markdown("", heads.blocks(results), "benchmarks")
    assert text.count(" x 300 x 16 | ") == len(rows)
    assert "commit abc" in text


def measured(contender, job="statistics + gradients", **more):
    return {"job": job, "rows": 8192, "contender": contender, "ratio": 1.2, "share": 0.9} | more


SPOILT = {  # by target: a measurement that misses it
    "every linear head": measured("kl_kernels", share=0.84),
    "the same": measured("verl Triton", ratio=0.99),
    "`linear_token_stats`": measured("TRL chunked", ratio=0.94),
    "`linear_policy_loss`": measured("TRL chunked", "policy loss + gradients", ratio=0.99),
}


@pytest.mark.parametrize("begins", SPOILT)
def test_each_target_is_met_until_its_own_figures_are_spoilt(bench, begins):
    from bench.gpu.targets import HEAD_TARGETS, verdict

    jobs = ("statistics + gradients", "policy loss + gradients")
    names = ("kl_kernels", "TRL chunked", "verl Triton", "Liger fused linear", "torch eager")
    fine = [measured(name, job) for job in jobs for name in names]
    fine.append(measured("TRL chunked", ratio=0.96))
    results = {"measurements": fine}
    assert all(verdict(t, results, "kl_kernels").startswith("met") for t in HEAD_TARGETS)
    assert {t.says.startswith(tuple(SPOILT)) for t in HEAD_TARGETS} == {True}
    results = {"measurements": [*fine, SPOILT[begins]]}
    for target in HEAD_TARGETS:
        found = verdict(target, results, "kl_kernels")
        assert found.startswith("**missed**") == target.says.startswith(begins), target.says
    few = {"measurements": [*fine, SPOILT[begins] | {"rows": 64}]}
    assert all(verdict(t, few, "kl_kernels").startswith("met") for t in HEAD_TARGETS)
