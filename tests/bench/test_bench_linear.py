"""Linear heads beside other packages, in tiny sizes: what is asked, what is checked and shown."""

from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))


def tiny(job, dtype=torch.float32):
    from bench.peers.definitions import Size
    from bench.peers.linear import LinearCase

    return LinearCase.of(job, Size(8, 301, 16), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_job_is_done_right_by_all_that_are_here(bench, dtype):
    from bench.peers.contenders import OURS
    from bench.peers.linear import JOBS, measure

    for job in JOBS:
        with torch.compiler.set_stance("force_eager"):  # the formulas, without the compiler
            rows, left_out = measure(tiny(job, dtype), seconds=0.0)
        names = [row["contender"] for row in rows]
        assert names[0] == OURS
        assert set(names) >= {"torch eager", "torch.compile"}
        assert all(entry["reason"] and entry["operation"] == job for entry in left_out)
        for row in rows:
            assert row["rounds"] >= 1
            assert row["fastest_ms"] <= row["median_ms"] <= row["slowest_ms"]
            assert row["size"] == "8 x 301 x 16"
            assert ("gradient_error" in row) == ("+" in job)
        assert rows[0]["ratio"] == 1


def test_gradients_are_those_that_a_job_wants(bench):
    from bench.peers.contenders import contenders
    from bench.peers.linear import JOBS

    found = {}
    for job in JOBS:
        case = tiny(job)
        for contender in contenders(case.operation.name)[:2]:  # ours, and eager
            found[job, contender.name] = set(contender.ready()(case.inputs))
    for (job, _), names in found.items():
        assert ("gradient" in names) == ("+" in job)
        assert ("weight_gradient" in names) == job.endswith("+ gradients")


def test_a_wrong_head_is_not_timed(bench, monkeypatch):
    import kl_kernels
    from bench.peers.compare import Wrong
    from bench.peers.linear import measure

    right = kl_kernels.linear_policy_loss

    def wrong(*args, **kwargs):
        loss, metrics = right(*args, **kwargs)
        return 1.01 * loss, metrics

    monkeypatch.setattr(kl_kernels, "linear_policy_loss", wrong)
    with pytest.raises(Wrong, match="kl_kernels is not timed: loss"):
        measure(tiny("policy loss + gradients"), seconds=0.0)


def test_inputs_of_many_logits_are_checked_at_their_beginning(bench, monkeypatch):
    from bench.peers import heads
    from bench.peers.definitions import Size

    x = heads.make_heads(Size(64, 100, 8), torch.float32, "cpu")
    assert x.head() is x
    monkeypatch.setattr(heads, "LOGITS_CHECKED", 2000)
    part = x.head()
    assert part.hidden.requires_grad
    assert part.weight is x.weight
    for name in ("hidden", "ref_hidden", "token_ids"):
        assert torch.equal(getattr(part, name), getattr(x, name)[:20])
    assert part.by_response(part.token_ids).shape == (1, 20)
    assert x.by_response(x.hidden).shape == (4, 16, 8)


def test_the_cases_have_names_of_their_own(bench):
    from bench.cpu.linear import cases

    names = [str(case) for case in cases()]
    assert len(names) == len(set(names))
    for word in ("bfloat16", "float32", "frozen head", "policy loss", "64 x 151936 x 896"):
        assert any(word in name for name in names)


def test_a_case_that_would_not_end_in_time_is_known_beforehand(bench):
    from bench.cpu import linear
    from bench.peers.definitions import Size

    estimate = linear.Estimate()
    small, large = Size(8, 301, 16), Size(16, 301, 16)
    case = linear.LinearCase.of("statistics", small, linear.WIDE)
    estimate.learn(case, [{"median_ms": 3000.0}, {"median_ms": 2000.0}])
    found = {
        (job, dtype): estimate.seconds(linear.LinearCase.of(job, large, dtype))
        for job in ("statistics", "JSD", "JSD + gradients")
        for dtype in (linear.NARROW, linear.WIDE)
    }
    assert found.pop(("statistics", linear.WIDE)) == linear.COMPILERS + linear.CALLS * 10
    assert found.pop(("JSD", linear.WIDE)) == linear.COMPILERS + linear.CALLS * 10
    assert set(found.values()) == {linear.COMPILERS}


def made_up():
    """A results file of two jobs, as the benchmark writes it."""

    def row(job, contender, ratio, dtype="bfloat16", note=""):
        return {
            "job": job, "contender": contender, "family": "plain", "size": "64 x 1000 x 32",
            "rows": 64, "vocab_size": 1000, "width": 32, "dtype": dtype, "median_ms": 4.0 * ratio,
            "fastest_ms": 3.0 * ratio, "slowest_ms": 5.0 * ratio, "rounds": 7, "ratio": ratio,
            "extra_mb": 17.0, "value_error": 2e-7, "gradient_error": 1e-3, "note": note,
        }  # fmt: skip

    jobs = ("statistics + gradients", "policy loss + gradients")
    measurements = [
        row(job, name, ratio, dtype)
        for job in jobs
        for dtype in ("bfloat16", "float32")
        for name, ratio in (("kl_kernels", 1.0), ("torch eager", 5.0), ("torch.compile", 3.0))
    ]
    measurements.append(row(jobs[0], "CCE", 0.4, note="log-probability only"))
    reason = {"operation": jobs[0], "contender": "Liger", "reason": "Liger needs a GPU"}
    return {
        "device": "A CPU", "threads": 2, "kind": "cpu", "commit": "abc123",
        "facts": {"torch": "9.9", "linear heads": "multiply in float32 on cpu: no kernel"},
        "instruction_sets": ["fma", "avx2"], "load_average_at_start": 0.1,
        "peers": {"trl": "1.16.0"}, "command": "make bench-linear",
        "measurements": measurements, "not_measured": [reason],
    }  # fmt: skip


def test_the_page_has_every_number_and_says_where_others_are_faster(bench):
    from bench.cpu import linear_page
    from kl_kernels.lab.documents import to_markdown

    text = to_markdown("", linear_page.blocks(made_up()), "benchmarks", suffix=".svg")
    assert text.count("| 64 x 1000 x 32, ") == len(made_up()["measurements"])
    assert "| CCE (log-probability only) | 1.60 (1.20 to 2.00), 7 | **0.40** | 17 |" in text
    assert "faster than kl_kernels in 1 of 2 cases in bfloat16, 0 of 2 cases in float32" in text
    assert "Liger needs a GPU: Liger (statistics + gradients)" in text
    assert "The CPU has fma, avx2; linear heads here multiply in float32 on cpu." in text


def test_the_readme_shows_a_policy_loss_and_says_where_others_are_faster(bench):
    from bench.cpu import linear_page

    results = made_up()
    last = results["measurements"][-1]
    results["measurements"].append(last | {"job": "policy loss + gradients"})
    other_size = {"job": "policy loss + gradients", "size": "2 x 2 x 2", "contender": "kl_kernels"}
    results["measurements"].append(last | other_size)
    lines = linear_page.short_table(results).splitlines()
    assert "from hidden states, 64 x 1000 x 32" in lines[0]
    assert lines[2:5] == [
        "| policy loss, bfloat16 | 4.00 ms | 3.0x | 5.0x | 0.40x CCE (log-probability only) |",
        "| policy loss, float32 | 4.00 ms | 3.0x | 5.0x | none |",
        "",
    ]
    assert "faster than kl_kernels in 2 of 3 cases in bfloat16, 0 of 2 cases in" in lines[-1]
    assert "A CPU (fma, avx2), 2 thread(s), commit abc123" in lines[-1]
