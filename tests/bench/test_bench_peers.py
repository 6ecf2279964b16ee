"""The comparison with peers in tiny sizes: who is asked, who is refused, what is reported."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parents[2] / "bench"
TINY = {"logits": (8, 301, 0), "head": (6, 301, 16), "gae": (2048, 0, 0)}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))


def tiny_case(name, dtype=torch.float32):
    from bench.peers.compare import Case
    from bench.peers.definitions import Size
    from bench.peers.operations import OPERATIONS

    operation = OPERATIONS[name]
    kind = "gae" if name == "GAE" else "head" if "hidden" in operation.sources else "logits"
    return Case(operation, Size(*TINY[kind]), dtype)


def test_every_operation_is_compared_with_several(bench):
    from bench.peers.contenders import FAMILIES, OURS, REGISTRY, contenders
    from bench.peers.operations import OPERATIONS

    for operation in OPERATIONS:
        names = [c.name for c in contenders(operation)]
        assert names[0] == OURS  # the one that others are ratios of
        assert len(names) == len(set(names)) >= 3
    assert {c.family for c in REGISTRY} == set(FAMILIES)
    offered = {c.operation: set() for c in REGISTRY}
    for c in REGISTRY:
        offered[c.operation].add(c.family)
    assert offered["policy loss"] >= {"trl", "verl", "liger"}
    assert offered["linear policy loss"] >= {"plain", "trl", "verl", "liger", "cce"}
    assert offered["linear JSD"] >= {"plain", "trl", "liger"}
    assert offered["linear exact KL"] >= {"trl", "liger", "fla"}
    assert offered["linear logprob + entropy"] >= {"trl", "verl", "liger", "cce", "quack"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whoever_runs_here_is_right_and_whoever_does_not_says_why(bench, dtype):
    from bench.peers.compare import check
    from bench.peers.contenders import Unavailable, contenders
    from bench.peers.operations import OPERATIONS

    ran, reasons = set(), []
    for operation in OPERATIONS:
        case = tiny_case(operation, torch.float32 if operation == "GAE" else dtype)
        for contender in contenders(operation):
            try:
                call = contender.ready()
            except (ImportError, Unavailable) as error:
                reasons.append(str(error))
                continue
            with torch.compiler.set_stance("force_eager"):  # the formulas, without the compiler
                errors = check(case, contender, call)
            assert ("gradient_error" in errors) == bool(OPERATIONS[operation].sources)
            ran.add((operation, contender.family))
    assert all(reasons)
    assert ran >= {(name, family) for name in OPERATIONS for family in ("ours", "plain")}


@pytest.mark.parametrize("name", ["exact KL", "exact KL + gradient", "GAE", "PPO step"])
def test_a_wrong_contender_is_not_timed(bench, name):
    from bench.peers.compare import Wrong, check
    from bench.peers.contenders import contenders

    case = tiny_case(name)
    right = contenders(name)[0]

    def but(of, how):
        def call(x):
            results = right.ready()(x)
            return results | {of: how(results[of].detach().clone())}

        return call

    first = {"exact KL": "kl", "exact KL + gradient": "gradient", "GAE": "returns"}
    of = first.get(name, "rewards")

    def one_part_in_a_hundred(t):
        t.view(-1, t.shape[-1])[-1] *= 1.01
        return t

    check(case, right, but(of, lambda t: t))
    for how in (one_part_in_a_hundred, lambda t: t.fill_(torch.nan), lambda t: t[..., :-1]):
        with pytest.raises(Wrong, match=f"not timed: {of}"):
            check(case, right, but(of, how))


def test_a_peer_may_round_like_its_logits_only_if_it_says_so(bench):
    from bench.peers.compare import Wrong, check
    from bench.peers.contenders import contenders

    case = tiny_case("token logprob", torch.bfloat16)
    exact = contenders("token logprob")[1]

    def in_bfloat16(x):
        log_p = x.logits.detach().log_softmax(-1)
        return {"logprob": log_p.gather(-1, x.token_ids[..., None]).squeeze(-1).float()}

    check(case, dataclasses.replace(exact, rounds=True), in_bfloat16)
    with pytest.raises(Wrong):
        check(case, exact, in_bfloat16)


def test_what_cannot_fit_is_left_out_with_its_size(bench):
    from bench.peers.compare import too_large
    from bench.peers.definitions import Size

    assert too_large(Size(64, 131072), 1 << 34) == ""
    assert "34 GB" in too_large(Size(8192, 131072), 1 << 34)


def test_the_checked_part_of_large_inputs_is_the_beginning(bench, monkeypatch):
    from bench.peers import operations

    x = operations.make_inputs(operations.Size(64, 100), torch.float32, "cpu")
    monkeypatch.setattr(operations, "LOGITS_CHECKED", 1600)
    part = x.head()
    assert part.logits.shape == (4, 4, 100)
    assert part.logits.requires_grad
    for name in ("logits", "ref_logits", "token_ids", "old_logprobs", "values", "mask"):
        assert torch.equal(getattr(part, name), getattr(x, name)[:, :4])
    monkeypatch.setattr(operations, "LOGITS_CHECKED", 100)
    assert x.head().logits.shape == (1, 1, 100)


def made_up():
    """A results file of two operations, as the comparison writes it."""

    def row(operation, contender, ratio, dtype="bfloat16", rows=64, **more):
        return {
            "operation": operation, "contender": contender, "family": "plain",
            "size": f"{rows} x 1000", "rows": rows, "vocab_size": 1000, "width": 0, "dtype": dtype,
            "median_ms": 2.0 * ratio, "fastest_ms": 1.5 * ratio, "slowest_ms": 300.0 * ratio,
            "rounds": 7, "ratio": ratio, "gb_per_s": 12.0 / ratio, "share": 0.5 / ratio,
            "extra_mb": 17.0 * ratio, "page_faults": 123.0, "value_error": 2e-7, "note": "",
        } | more  # fmt: skip

    measurements = [
        row("exact KL + gradient", name, ratio, dtype, rows, gradient_error=1e-3)
        for dtype, rows in (("bfloat16", 64), ("float32", 64), ("bfloat16", 512))
        for name, ratio in (("kl_kernels", 1.0), ("torch eager", 50.0), ("torch.compile", 8.0))
    ]
    measurements += [
        row("GAE", "kl_kernels", 1.0, "float32", gb_per_s=0.0, share=0.0),
        row("GAE", "Python loop", 40.0, "float32", gb_per_s=0.0, share=0.0),
        row("GAE", "verl", 41.0, "float32", gb_per_s=0.0, share=0.0, note="whitened | twice"),
    ]
    return {
        "device": "A CPU",
        "threads": 2,
        "kind": "cpu",
        "read_gb_per_s": 38.0,
        "commit": "abc123",
        "facts": {"torch": "9.9"},
        "peers": {"trl": "1.16.0", "quack-kernels": "not installed"},
        "command": "make bench",
        "measurements": measurements,
        "not_measured": [
            {"operation": "exact KL", "contender": name, "reason": "Liger needs a GPU"}
            for name in ("Liger KL", "Liger JSD")
        ],
    }


def test_the_page_has_every_number_and_every_reason(bench):
    from bench.peers import page as peers_page
    from kl_kernels.lab.documents import to_markdown

    text = to_markdown("", peers_page.blocks(made_up()), "benchmarks", suffix=".svg")
    assert "A CPU with 2 threads; torch 9.9, trl 1.16.0; commit abc123; `make bench`" in text
    assert "quack" not in text
    assert "Liger needs a GPU: Liger KL (exact KL); Liger JSD (exact KL)" in text
    assert (
        "| 64 x 1000, bfloat16 | torch eager | 100 (75.0 to 15000) | **50.00** | 0.2 | 1%" in text
    )
    assert "verl (whitened \\| twice)" in text
    assert text.count("(benchmarks/peers_") == 3


def with_a_step(*others):
    """The same, and a PPO step, of ours and others: contender, family, ratio, note."""
    results = made_up()
    like = results["measurements"][0]
    results["measurements"] += [
        like | {"operation": operation, "contender": contender, "family": family, "ratio": ratio,
                "median_ms": 2.0 * ratio, "note": note}
        for operation in ("PPO step", "policy loss")
        for contender, family, ratio, note in (("kl_kernels", "ours", 1.0, ""), *others)
    ]  # fmt: skip
    return results


def test_the_readme_shows_the_first_size_beside_the_fastest_of_the_others(bench):
    from bench.peers import page as peers_page

    others = [
        ("torch.compile", "plain", 0.5, ""), ("torch eager", "plain", 1.04, ""),
        ("TRL", "trl", 3.0, ""), ("Liger (compiled)", "liger", 0.333, "no entropy"),
    ]  # fmt: skip
    lines = peers_page.short_table(with_a_step(*others)).splitlines()
    assert lines[0].endswith("(docs/benchmarks/peers_step.svg)")
    assert lines[4:6] == [
        "| exact KL + gradient | 2.00 ms | 8.0x | 50.0x | none |",
        "| policy loss | 2.00 ms | 0.50x | 1.0x | 0.33x Liger (no entropy) |",
    ]
    assert "64 x 1000 logits in bfloat16" in lines[-1]
    assert "A CPU with 2 threads; torch 9.9, trl 1.16.0; commit abc123" in lines[-1]


def test_the_readmes_picture_is_drawn_where_there_is_a_whole_step(bench):
    from bench.peers import page as peers_page
    from bench.peers import pictures as peers_pictures
    from kl_kernels.lab.documents import Picture

    results = with_a_step(("TRL", "trl", 3.0, ""))
    shown = {b.name for b in peers_page.blocks(results) if isinstance(b, Picture)}
    assert shown == set(peers_pictures.pictures(results))
    assert "peers_step" in shown


def test_pictures_are_the_same_twice_and_say_what_is_there(bench):
    from bench.peers import pictures as peers_pictures

    found = peers_pictures.pictures(made_up())
    assert set(found) == {"peers_times", "peers_memory", "peers_sizes"}
    assert found == peers_pictures.pictures(made_up())
    assert all(svg.startswith(b"<?xml") and b"<svg" in svg for svg in found.values())


def test_a_picture_of_other_results_is_stale(bench, monkeypatch, tmp_path):
    from bench.common import report

    results, pictures = tmp_path / "results", tmp_path / "pictures"
    results.mkdir()
    monkeypatch.setattr(report, "RESULTS", results)
    monkeypatch.setattr(report, "PICTURES", pictures)
    (results / "peers.json").write_text(json.dumps(made_up()))
    assert list(report.parts()) == ["peers"]
    names = {"peers_times", "peers_memory", "peers_sizes"}
    assert set(report.stale_pictures()) == names
    report.draw()
    assert not report.stale_pictures()
    page = report.page()
    assert page.count("data:image/svg+xml;base64,") == 3
    assert "<script" not in page
    (results / "peers.json").write_text(json.dumps(made_up() | {"commit": "other"}))
    assert set(report.stale_pictures()) == names


def test_the_command_needs_a_checkout(monkeypatch, tmp_path, capsys):
    from kl_kernels import cli
    from kl_kernels.lab import bench

    monkeypatch.setattr(bench.extras, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench"]) == 2
    assert "run it in a checkout" in capsys.readouterr().err


@pytest.fixture
def calls(monkeypatch):
    """Record the commands that would run, without running them."""
    from kl_kernels.lab import bench

    ran = []

    def run(command, **options):
        ran.append((command, options))
        return type("", (), {"returncode": 3})

    monkeypatch.setattr(bench.subprocess, "run", run)
    return ran


def test_the_command_passes_its_options_on(calls):
    from kl_kernels import cli

    assert cli.main(["bench", "--save", "--threads", "1", "--only", "GAE"]) == 3
    ((command, options),) = calls
    assert {"--save", "--threads=1", "--only=GAE", "--benchmark-only"} <= set(command)
    assert "--full" not in command
    assert options["cwd"] == BENCH.parent


@pytest.mark.parametrize("folder", [".", "bench", "docs/how-to"])
def test_the_command_finds_the_checkout_that_it_is_called_in(calls, folder, monkeypatch, tmp_path):
    """An installed package measures itself: it is what PYTHONPATH begins with."""
    from kl_kernels import cli
    from kl_kernels.lab import bench

    monkeypatch.setattr(bench.extras, "ROOT", tmp_path)  # as if it were installed there
    monkeypatch.chdir(BENCH.parent / folder)
    assert cli.main(["bench"]) == 3
    ((_, options),) = calls
    assert options["cwd"] == BENCH.parent
    assert options["env"]["PYTHONPATH"].split(os.pathsep)[0] == str(tmp_path)


def test_listed_names_are_what_only_takes_and_what_results_are_told_under(capfd, bench):
    from bench.peers.compare import benchmarks, name_of
    from kl_kernels import cli

    assert cli.main(["bench", "--list"]) == 0
    names = capfd.readouterr().out.splitlines()
    assert names == [name_of(str(case), c.name) for case, c in benchmarks(full=False)]
    for name in names:
        assert name in [name_of(str(case), c.name) for case, c in benchmarks(False, only=name)]
    assert cli.main(["bench", "--list", "--only", "GAE"]) == 0
    only = capfd.readouterr().out.splitlines()
    assert only == [name for name in names if name.startswith("GAE, ")]

    small = name_of("GAE, 65536, float32", "kl_kernels")
    assert small in only
    assert cli.main(["bench", "--only", small]) == 0
    (row,) = [x for x in capfd.readouterr().out.splitlines() if x.startswith(small)]
    assert float(row.removeprefix(small).split()[0]) > 0  # milliseconds


def test_a_name_that_no_benchmark_has_is_refused(capfd):
    from kl_kernels import cli

    assert cli.main(["bench", "--only", "GEA"]) == 2
    assert "only is 'GEA', which no benchmark's name contains; see --list" in capfd.readouterr().err
