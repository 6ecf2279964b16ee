"""`bench.cpu.side_by_side` sweeps the caches before what it calls cold; its page shows it all."""

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture(scope="module")
def bench(request):
    """Return a function that imports a module of `bench`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath)
        yield lambda name: importlib.import_module(f"bench.{name}")


def cpu(folder, number, *caches):
    """Write what sysfs says of a CPU's caches: (level, type, size, CPUs that share it)."""
    for i, (level, kind, size, cpu_list) in enumerate(caches):
        index = folder / f"cpu{number}" / "cache" / f"index{i}"
        index.mkdir(parents=True)
        index.joinpath("level").write_text(f"{level}\n")
        index.joinpath("type").write_text(f"{kind}\n")
        index.joinpath("size").write_text(f"{size}\n")
        index.joinpath("shared_cpu_list").write_text(f"{cpu_list}\n")


def test_a_last_level_cache_counts_once_for_all_that_share_it(bench, tmp_path):
    for number, sharing in enumerate(("0-1", "0-1", "2-3", "2-3")):
        cpu(
            tmp_path,
            number,
            (1, "Data", "32K", number),
            (1, "Instruction", "64K", number),
            (2, "Unified", "512K", number),
            (3, "Unified", "32M" if number < 2 else "16384K", sharing),
        )
    assert bench("common.machine").last_level_cache_bytes(tmp_path) == 48 << 20


def test_without_further_levels_the_first_is_the_last_and_instructions_do_not_count(
    bench, tmp_path
):
    for number in range(2):
        cpu(tmp_path, number, (1, "Data", "32K", number), (1, "Instruction", "64K", "0-1"))
    assert bench("common.machine").last_level_cache_bytes(tmp_path) == 64 << 10


def test_a_machine_that_hides_its_caches_is_refused(bench, tmp_path):
    with pytest.raises(RuntimeError, match="tells of no caches"):
        bench("common.machine").last_level_cache_bytes(tmp_path)


def test_a_sweep_reads_several_times_the_cache_and_leaves_nothing_to_write(bench):
    timing, read = bench("common.timing"), []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not func._schema.is_mutable
            read.extend(a.untyped_storage().nbytes() for a in args if isinstance(a, torch.Tensor))
            return func(*args, **(kwargs or {}))

    cache_bytes = 1 << 20
    cold = timing.cold_buffer(cache_bytes)
    assert cold.all()  # written: pages never written to are one and the same, which is no sweep
    with Reads():
        timing.sweep(cold)
    assert read
    assert max(read) >= timing.CACHES * cache_bytes >= 2 * cache_bytes


def test_a_cold_call_is_timed_after_the_sweep_and_without_it(bench, monkeypatch):
    timing, events = bench("common.timing"), []
    monkeypatch.setattr(timing, "sweep", lambda cold: events.append(cold))

    def clock():
        events.append("clock")
        return float(len(events))

    cold = torch.ones(8)
    assert timing.timed(events.append, "call", cold, clock) == 2
    assert events == [cold, "clock", "call", "clock"]
    events.clear()
    timing.timed(events.append, "call", None, clock)
    assert events == ["clock", "call", "clock"]


def test_each_contender_is_called_cold_and_then_warm_in_every_round(bench, monkeypatch):
    side_by_side, events = bench("cpu.side_by_side"), []
    monkeypatch.setattr(bench("common.timing"), "sweep", lambda cold: events.append("sweep"))
    calls = {name: lambda x, name=name: events.append(name) for name in ("ours", "theirs")}
    ticks = iter(range(100))
    seconds, faults = side_by_side.interleaved(
        calls, (1,), 2, torch.ones(8), lambda: float(next(ticks) ** 2)
    )
    assert events == ["sweep", "ours", "ours", "sweep", "theirs", "theirs"] * 2
    # The clock's n-th call says n squared: a span that begins with the n-th is 2n + 1.
    assert seconds["ours"]["cold"].tolist() == [1, 17]
    assert seconds["ours"]["warm"].tolist() == [5, 21]
    assert seconds["theirs"]["cold"].tolist() == [9, 25]
    assert faults.keys() == calls.keys()


def test_a_ratio_is_of_neighbours_in_time(bench):
    """A machine that grows slower from round to round is slower for both."""
    ours = np.array([1.0, 2.0, 4.0, 8.0])
    times = bench("cpu.side_by_side").Times.of(np.array([3.0, 3, 2, 4]) * ours, ours)
    assert (times.ratio, times.lowest_ratio, times.highest_ratio) == (3, 2, 4)
    assert (times.median_ms, times.fastest_ms, times.slowest_ms) == (7000, 3000, 32000)


RECORD = {"device": "A CPU", "threads": 1, "facts": {"torch": "2.0"}, "commit": "abc"}


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    """Return results of a run that sweeps 4 MiB, and in which torch.compile compiles nothing."""
    side_by_side = bench("cpu.side_by_side")
    out = tmp_path_factory.mktemp("results") / "cpu.json"
    options = f"--rows 2 5 --vocab 500 --dtypes float32 --rounds 3 --threads 1 --out {out}"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda call, **options: call)
        patch.setattr(torch.compiler, "reset", lambda: None)
        patch.setattr(side_by_side, "record", lambda: RECORD)
        patch.setattr(side_by_side, "last_level_cache_bytes", lambda: 1 << 20)
        patch.setattr(side_by_side, "read_bandwidth", lambda clock: 2e10)
        patch.setattr(side_by_side, "read_write_bandwidth", lambda clock: 1e10)
        patch.setattr(sys, "argv", ["side_by_side", *options.split()])
        side_by_side.main()
    torch.set_num_threads(threads)
    return out.read_text()


@pytest.fixture
def measured(run):
    return json.loads(run)


def test_every_contender_of_every_job_is_measured_in_both_states(bench, measured):
    side_by_side, page = bench("cpu.side_by_side"), bench("cpu.page")
    assert measured["swept_bytes"] >= 2 * measured["cache_bytes"]
    cases = page.cases(measured)
    assert list(cases) == [(job, "float32", n) for n in (2, 5) for job in side_by_side.PASSES]
    for (job, _, n_rows), by in cases.items():
        two_visits = {"in two visits"} if job == "policy loss" else set()
        assert set(by) == {"kl_kernels", "torch.compile", "eager"} | two_visits
        for m in by.values():
            for times in (m["warm"], m["cold"]):
                assert 0 < times["fastest_ms"] <= times["median_ms"] <= times["slowest_ms"]
                assert times["lowest_ratio"] <= times["ratio"] <= times["highest_ratio"]
            moved = side_by_side.PASSES[job] * n_rows * 500 * 4
            assert m["cold_gb_per_s"] * m["cold"]["median_ms"] * 1e6 == pytest.approx(moved)
        assert by["kl_kernels"]["cold"]["ratio"] == by["kl_kernels"]["warm"]["ratio"] == 1


def test_the_tables_show_every_ratio_warm_and_cold(bench, measured):
    page = bench("cpu.page")
    header, _, *lines = page.times_table(measured).splitlines()
    assert len(lines) == 8
    assert all(line.count("|") == header.count("|") for line in lines)
    assert header.count("torch.compile") == header.count("eager") == 2
    for line, by in zip(lines, page.cases(measured).values()):
        for name in set(by) - {"kl_kernels"}:
            for state in ("warm", "cold"):
                assert f"{by[name][state]['ratio']:.2f}x" in line


def test_the_text_says_how_it_was_measured(bench, measured):
    page = bench("cpu.page")
    text = page.tables(measured)
    for part in (page.times_table(measured), page.cost_table(measured), "A CPU", "commit abc"):
        assert part in text
    assert "reading 4 MiB, 4 times the last-level cache" in text
    assert "the thread had a core" not in text
    assert "the thread had a core" in page.tables(measured | {"clock": "thread"})


def test_the_readme_shows_one_size_cold_and_warm(bench, measured, monkeypatch):
    page = bench("cpu.page")
    monkeypatch.setattr(page, "SHOWN_ROWS", 5)
    monkeypatch.setattr(page, "SHOWN_DTYPE", "float32")
    sentence = page.sentence(measured)
    for job, name in page.NAMES.items():
        m = page.cases(measured)[job, "float32", 5]["torch.compile"]
        assert f" {name} {m['cold']['ratio']:.1f}x ({m['warm']['ratio']:.1f}x)" in sentence


def test_the_cost_of_cold_logits_is_per_logit(bench, measured):
    page = bench("cpu.page")
    for (_, _, n_rows), by in page.cases(measured).items():
        by["kl_kernels"]["warm"]["median_ms"] = 3.0 * n_rows
        by["kl_kernels"]["cold"]["median_ms"] = 3.6 * n_rows
        by["kl_kernels"]["cold_gb_per_s"] = 5.0
    lines = page.cost_table(measured).splitlines()
    assert lines[0].startswith("| 5 rows cold over 2 warm")
    assert lines[2:] == [
        "| stats | 1.20x (5.0, 25%) |",
        "| forward | 1.20x (5.0, 25%) |",
        "| forward+backward | 1.20x (5.0, 50%) |",
        "| policy loss | 1.20x (5.0, 50%) |",
    ]


def test_a_threads_clock_is_for_one_thread(bench, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["side_by_side", "--clock", "thread", "--threads", "2"])
    with pytest.raises(SystemExit):
        bench("cpu.side_by_side").main()
    assert "it needs --threads 1" in capsys.readouterr().err
