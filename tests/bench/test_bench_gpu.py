"""The steps, jobs and bookkeeping of `make gpu`, as far as they run without a GPU."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kl_kernels.lab.validate.command import add_arguments

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parent))


def test_the_benchmarks_run_dry(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.measure", "--dry-run", "--turns", "2"]
    environment = {"PYTHONPATH": str(BENCH.parent), "PATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--results", tmp_path, "--commit", "abc"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu_dry_run.json").read_text())
    assert results["commit"] == "abc"
    assert not results["failed"]
    found = {(m["job"], m["rows"], m["contender"]) for m in results["measurements"]}
    jobs = {job for job, _, _ in found}
    assert found == {(j, n, c) for j in jobs for n in (1, 5) for c in ("reference", "cpu", "eager")}
    assert len(jobs) == 8
    for m in results["measurements"]:
        assert m["fastest_us"] <= m["median_us"] <= m["slowest_us"]
        assert (m["call_us"] is None) == (m["rows"] not in (1, 64))
        rate = results["ceilings_gb_per_s"][m["ceiling"]]
        assert m["share"] == pytest.approx(m["gb_per_s"] / rate)
    lines = done.stdout.splitlines()
    assert sum(line.startswith(tuple(jobs)) for line in lines[-17:]) == 16  # the table ends it


def test_a_wrong_kernel_is_not_timed(bench):
    from bench.gpu.jobs import JOBS, make_buffers

    buffers = make_buffers(6, 500, ("cpu",), "cpu", 0)
    for job in JOBS.values():
        right = job.ours("cpu")
        job.check(right, buffers)

        def wrong(b, right=right, job=job):
            """The last row is off by one part in a hundred."""
            outputs = [t.clone() for t in right(b)]
            (outputs[0].view(-1, 500) if job.is_gradient else outputs[0])[-1] *= 1.01
            return outputs

        with pytest.raises(RuntimeError, match="wrong"):
            job.check(wrong, buffers)


def test_peers_compute_what_ours_do(bench):
    from bench.gpu.jobs import JOBS, make_buffers

    buffers = make_buffers(6, 500, ("cpu",), "cpu", 0)
    for name, job in JOBS.items():
        for ours, peers in zip(job.ours("cpu")(buffers), job.plain(job.formula)(buffers)):
            ours = ours.reshape(peers.shape)
            tolerance = 1e-4 if peers.dtype == torch.float32 else 0.01
            torch.testing.assert_close(ours, peers, atol=tolerance, rtol=tolerance, msg=name)


def test_buffers_exceed_the_cache_and_replays_the_clock(bench):
    from bench.common.timing import CACHES, MOST_LAUNCHES, n_buffer_sets, n_rounds_of_sets
    from bench.gpu.measure import ROWS, Case, cases

    l2_bytes = 60 << 20
    for case in cases():
        n_sets = n_buffer_sets(case.bytes_moved, l2_bytes)
        assert n_sets * case.bytes_moved >= CACHES * l2_bytes
        assert n_sets == 1 or (n_sets - 1) * case.bytes_moved < CACHES * l2_bytes
        rounds = n_rounds_of_sets(n_sets, case.bytes_moved)
        # Half a millisecond at 5 TB/s; few rows take longer than their bytes.
        assert rounds * n_sets >= MOST_LAUNCHES / 2 or rounds * n_sets * case.bytes_moved > 2e9
    assert len({case.name for case in cases()}) == len(cases())
    assert {c.rows for c in cases() if c.job == "token_kl"} >= set(ROWS)
    assert Case("logprob gradient", 2, 10).bytes_moved == 2 * 2 * 10 * 2
    assert Case("KL gradient", 2, 10).bytes_moved == 3 * 2 * 10 * 2


def test_chips_are_called_by_their_names(bench):
    from bench.common.machine import chip_name

    assert chip_name("NVIDIA H200") == "h200"
    assert chip_name("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_a_step_that_fails_or_hangs_costs_no_other(bench, tmp_path):
    from bench.gpu.make_gpu import Log, Step

    python = [sys.executable, "-c"]
    log = Log(tmp_path / "log")
    hang = "import subprocess; print('begun', flush=True); subprocess.run(['sleep', '60'])"
    outcomes = log.run(
        Step("good", [*python, "print('fine')"], 30),
        Step("bad", [*python, "print('before'); raise SystemExit(3)"], 30),
        Step("hung", [*python, hang], 2),
        Step("absent", ["/no/such/program"], 5),
    )
    assert [outcome.code for outcome in outcomes] == [0, 3, None, 127]
    assert [outcome.good for outcome in outcomes] == [True, False, False, False]
    text = log.path.read_text()
    for said in ("fine", "before", "begun"):
        assert said in text


def test_every_gpu_backend_has_a_numerics_report_of_its_own(bench, tmp_path):
    from bench.gpu.make_gpu import report_steps

    arguments = argparse.Namespace(dry_run=False, results=tmp_path, commit="abc")
    steps = {step.name: step.command for step in report_steps(arguments)}
    assert set(steps) == {"numerics triton", "numerics cuda"}
    for backend in ("triton", "cuda"):
        options = argparse.ArgumentParser()
        add_arguments(options)
        given = options.parse_args(steps[f"numerics {backend}"][4:])
        assert (given.backend, given.commit, given.quick) == ([backend], "abc", False)
        assert given.report == tmp_path / f"numerics_{backend}"


def test_without_a_gpu_it_says_so_at_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu.make_gpu", tmp_path],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert done.stderr == "error: torch finds no GPU; --dry-run tries the steps without one\n"
