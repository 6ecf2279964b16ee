"""The numerics report: its truth, its rows, its gate against broken backends, its files."""

import json
from dataclasses import asdict, replace

import mpmath
import numpy as np
import pytest
import torch

from kl_kernels import versions
from kl_kernels.backends.reference import operators as reference
from kl_kernels.cli import main
from kl_kernels.lab.validate import command
from kl_kernels.lab.validate.cases import NEG_INF, Inputs
from kl_kernels.lab.validate.report.eager import upcast_eager
from kl_kernels.lab.validate.report.gate import breaches
from kl_kernels.lab.validate.report.grid import DEFAULT, INTERPRETED, QUICK, Cell
from kl_kernels.lab.validate.report.interpreter import summed_as_on_a_gpu
from kl_kernels.lab.validate.report.measure import (
    DTYPE_EAGER,
    EAGER,
    EAGERS,
    GRADIENTS,
    VALUES,
    fused,
    measure,
    true_of,
)
from kl_kernels.lab.validate.report.rows import exact_kl, make_rows
from kl_kernels.lab.validate.report.table import short
from kl_kernels.lab.validate.truth import BETA

CELL = Cell("kl", "float32", 257, 1e-2, 3.0, 1.0, 0.0, 0.0, 8)
EQUAL, SMALL = replace(CELL, kl=0), replace(CELL, kl=1e-5)
RULED_OUT = replace(CELL, inf_fraction=0.5)
DISTANCES = (0.0, 1e-4, 1e-2, 1.0, 30.0)


def tiny_rows(distance, temperature):
    g = torch.Generator().manual_seed(0)
    x, noise = 3 * torch.randn(1, 4, 5, generator=g), torch.randn(1, 4, 5, generator=g)
    y = x + distance * noise
    for t in (x, y):
        t[0, 3, 1] = NEG_INF
    return Inputs(x, y, torch.tensor([[0, 4, 2, 3]]), temperature=temperature)


def enumerated(x, y, token, temperature):
    """Compute one row by the definitions, with 40 digits: outputs, and gradients as lists."""
    weights = [
        [mpmath.exp(mpmath.mpf(float(v)) / temperature) for v in logits] for logits in (x, y)
    ]
    p, q = ([w / mpmath.fsum(of) for w in of] for of in weights)
    m = [(1 - BETA) * a + BETA * b for a, b in zip(p, q)]

    def kl(a, b):
        return mpmath.fsum(s * mpmath.log(s / t) for s, t in zip(a, b) if s)

    def log(s):
        return mpmath.log(s) if s else mpmath.mpf(0)  # where it has no weight

    entropy = -mpmath.fsum(s * log(s) for s in p)
    own = [float(i == token) for i in range(len(p))]
    forward, reverse, of_mixture = kl(q, p), kl(p, q), kl(p, m)
    gradients = {
        "d logprob": [a - s for a, s in zip(own, p)],
        "d kl": [s * (log(s) - log(t) - reverse) for s, t in zip(p, q)],
        "d forward_kl": [s - t for s, t in zip(p, q)],
        "d entropy": [-s * (log(s) + entropy) for s in p],
        "d jsd": [(1 - BETA) * s * (log(s) - log(t) - of_mixture) for s, t in zip(p, m)],
    }
    gradients["d stats"] = [a + b for a, b in zip(gradients["d logprob"], gradients["d entropy"])]
    outputs = {
        "logprob": log(p[token]),
        "ref_logprob": log(q[token]),
        "kl": reverse,
        "forward_kl": forward,
        "entropy": entropy,
        "jsd": BETA * kl(q, m) + (1 - BETA) * kl(p, m),
    }
    return outputs, {
        name: [v / mpmath.mpf(temperature) for v in of] for name, of in gradients.items()
    }


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_truth_is_what_enumeration_with_40_digits_finds(distance, temperature):
    inputs = tiny_rows(distance, temperature)
    found = true_of(inputs)
    with mpmath.workdps(40):
        for row in range(4):
            x, y = inputs.logits[0, row], inputs.ref_logits[0, row]
            outputs, gradients = enumerated(x, y, int(inputs.token_ids[0, row]), temperature)
            for name, true in outputs.items():
                error = abs(mpmath.mpf(float(found[name][0, row])) - true)
                assert error <= 1e-15 * max(1, abs(true)), name
            for name, true in gradients.items():
                for got, of_logit in zip(found[name][0, row].tolist(), true):
                    size = max(1, abs(outputs["kl"])) / temperature
                    assert abs(mpmath.mpf(got) - of_logit) <= 1e-15 * size, name


@pytest.mark.parametrize("distance", DISTANCES)
def test_the_kl_that_rows_are_made_by_has_all_its_digits(distance):
    inputs = tiny_rows(distance, 1.0)
    x, y = inputs.logits[0], inputs.ref_logits[0]
    found = exact_kl(x, y, x.double().softmax(-1), 1.0)
    with mpmath.workdps(40):
        for row in range(4):
            true = enumerated(x[row], y[row], 0, 1.0)[0]["kl"]
            assert abs(mpmath.mpf(float(found[row])) - true) <= 1e-11 * true


@pytest.mark.parametrize("kl", [1e-8, 1e-5, 1.0, 100.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_have_the_kl_their_cell_asks_for(kl, dtype):
    cell = replace(CELL, kl=kl, dtype=dtype, vocab_size=2049, temperature=0.7)
    inputs = make_rows(cell)
    assert inputs.logits.dtype == inputs.ref_logits.dtype == getattr(torch, dtype)
    found = true_of(inputs)["kl"]
    # The fewer logits a step moves, the coarser is what can be reached in bfloat16.
    most = 1.01 if dtype == "float32" else 1.05 if kl >= 1 else 10
    assert (found >= 0.999 * kl).all()
    assert (found <= most * kl).all()


def test_rows_are_offset_and_ruled_out_as_their_cell_says():
    inputs = make_rows(replace(CELL, offset=1e3, inf_fraction=0.5))
    out = inputs.logits == NEG_INF
    assert torch.equal(out, inputs.ref_logits == NEG_INF)
    assert 0.4 < out.double().mean() < 0.6
    assert not out.gather(-1, inputs.token_ids[..., None]).any()
    for logits, offset in ((inputs.logits, 1e3), (inputs.ref_logits, -1e3)):
        assert abs(logits[~out].mean() - offset) < 1
    equal = make_rows(EQUAL)
    assert torch.equal(equal.logits, equal.ref_logits)


def test_the_grid_reaches_as_far_as_it_should():
    cells = DEFAULT.cells()
    assert len({cell.name for cell in cells}) == len(cells)
    assert {cell.dtype for cell in cells} == {"float32", "bfloat16", "float16"}
    assert {1e-8, 100.0, 0} <= {cell.kl for cell in cells}
    assert max(cell.vocab_size for cell in cells) > 131072
    assert any(cell.vocab_size % 2 for cell in cells)
    for dtype, most in (("float32", 1e4), ("float16", 1e3), ("bfloat16", 1e2)):
        offsets = {cell.offset for cell in cells if cell.dtype == dtype}
        assert {-most, most} <= offsets
        assert max(offsets) == most


def judged(backend, *cells, name="cpu"):
    runs = {name: backend, **EAGERS}
    return [str(b) for b in breaches({"cells": [measure(cell, runs) for cell in cells]})]


def changed(quantity, change):
    """The CPU backend, but for one quantity."""

    def backend(inputs):
        found = fused(inputs, "cpu")
        return found | {quantity: change(found[quantity], inputs)}

    return backend


def test_the_gate_holds_for_the_cpu_backend():
    assert judged(lambda inputs: fused(inputs, "cpu"), CELL, EQUAL, SMALL, RULED_OUT) == []


def test_the_gate_holds_for_interpreted_triton():
    cells = [replace(cell, vocab_size=65, rows=1) for cell in (CELL, EQUAL, SMALL, RULED_OUT)]
    assert judged(lambda inputs: fused(inputs, "triton"), *cells, name="triton") == []


def test_eager_itself_breaks_the_gate():
    """Naive float32 is as good as eager, and neither exact near 0 nor a number beside -inf."""
    said = "\n".join(judged(upcast_eager, SMALL, RULED_OUT))
    assert f"cpu: kl of {SMALL.name}: off by" in said
    assert "of 1e-05, over 0.1%" in said
    assert f"cpu: kl of {RULED_OUT.name}: 8 numbers are not finite" in said
    assert f"cpu: d entropy of {RULED_OUT.name}" in said


BROKEN = {
    "nearly 0": ("kl", EQUAL, lambda kl, _: kl + 1e-7, "up to 1e-07 for equal rows"),
    "negative": ("kl", EQUAL, lambda kl, _: kl - 1e-12, "8 rows are negative"),
    "negative entropy": ("entropy", CELL, lambda h, _: -h, "8 rows are negative"),
    "NaN": ("jsd", RULED_OUT, lambda jsd, _: jsd * torch.nan, "8 numbers are not finite"),
    "one part in 1e5": ("kl", replace(CELL, kl=1.0), lambda kl, _: kl * 1.00001, "ulp (eager"),
    "0.2 % of a small KL": (
        "kl", replace(SMALL, spread=30.0), lambda kl, _: kl * 1.002, "of 1e-05, over 0.1%",
    ),
    "8 ulps in each row": ("logprob", CELL, lambda lp, _: lp * (1 + 2**-20), "max "),
    "3 ulps in each row": (
        "ref_logprob", CELL, lambda lp, _: lp.double() * (1 + 3 * 2**-23), "mean ",
    ),
    "one column": (
        "d kl", CELL, lambda grad, _: grad.index_fill(-1, torch.tensor([3]), 1e-3), "ulp (eager",
    ),
    "bfloat16 arithmetic": (
        "kl", replace(CELL, dtype="bfloat16"),
        lambda _, i: (i.logits.softmax(-1) * (i.logits.log_softmax(-1)
                      - i.ref_logits.log_softmax(-1))).sum(-1).float(), "beyond 2e-6 of it",
    ),
    "no eager to compare": (
        "entropy", RULED_OUT, lambda h, _: h * 1.00001, "(no number from eager, 16",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_backend_breaks_the_gate_in_its_cell(case):
    quantity, cell, change, says = BROKEN[case]
    said = judged(changed(quantity, change), cell)
    assert said
    assert all(line.startswith(f"cpu: {quantity} of {cell.name}: ") for line in said)
    assert says in "\n".join(said)


def test_the_report_has_every_declared_cell_and_all_their_figures(tmp_path, capsys):
    arguments = ["validate", "--backend", "reference", "cpu", "--quick", "--report", str(tmp_path)]
    assert main([*arguments, "--commit", "abc"]) == 0
    shown = capsys.readouterr().out.splitlines()
    n = len(QUICK.cells())
    assert shown[-1] == f"all {n} cells passed on reference, cpu: {tmp_path / 'report.md'}"
    report = json.loads((tmp_path / "report.json").read_text())
    assert [m["cell"] for m in report["cells"]] == [asdict(cell) for cell in QUICK.cells()]
    assert report["grid"] == json.loads(json.dumps(asdict(QUICK)))
    assert report["commit"] == "abc"
    assert report["facts"]["torch"] == torch.__version__
    for m in report["cells"]:
        eagers = {EAGER} if m["cell"]["dtype"] == "float32" else {EAGER, DTYPE_EAGER}
        assert set(m["errors"]) == {"reference", "cpu"} | eagers
        for found in m["errors"].values():
            assert set(found) == {*VALUES, *GRADIENTS}
        for name in ("reference", "cpu"):
            for f in m["errors"][name].values():
                assert f["q10"] <= f["q50"] <= f["q90"] <= f["max"]
                assert f["mean"] <= f["max"]
    assert (tmp_path / "numerics.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.md").read_text()
    assert "commit abc" in page
    assert "The gate holds." in page
    assert not list(tmp_path.glob("*.partial"))


def test_a_worse_backend_is_named_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    finish = reference.finish

    def wrong(*args):
        right = finish(*args)
        return right._replace(kl=right.kl * 1.001)

    few = replace(
        QUICK,
        dtypes=("float32",),
        kls=(1e-2,),
        spreads=(),
        temperatures=(),
        offsets=(),
        inf_fractions=(),
        vocab_sizes=(),
    )
    monkeypatch.setattr(command, "QUICK", few)
    monkeypatch.setattr(reference, "finish", wrong)
    arguments = ["validate", "--backend", "reference", "--quick", "--report", str(tmp_path)]
    assert main(arguments) == 1
    says = f"reference: kl of {few.cells()[0].name}: max "
    shown = capsys.readouterr().out
    assert f"GATE BROKEN {says}" in shown
    n = shown.count("GATE BROKEN ")
    assert f"\n{n} checks of {len(few.cells())} cells failed: " in shown
    assert json.loads((tmp_path / "report.json").read_text())["breaches"][0].startswith(says)
    assert f"- {says}" in (tmp_path / "report.md").read_text()


def test_the_interpreter_has_cells_of_its_own():
    from kl_kernels.lab.validate.report.write import parts_of

    alone, both = parts_of(["triton"], DEFAULT), parts_of(["triton", "cpu"], DEFAULT)
    assert [(part.backends, part.grid) for part in alone] == [(("triton",), INTERPRETED)]
    assert [(part.backends, part.grid) for part in both] == [
        (("cpu",), DEFAULT),
        (("triton", "cpu"), INTERPRETED),
    ]


@pytest.mark.parametrize(("axis", "keep_dims", "shape"), [(1, False, (2,)), (1, True, (2, 1))])
def test_interpreted_sums_are_trees(axis, keep_dims, shape):
    """1 and 127 times half its ulp: a tree loses the first of them alone."""
    import triton.language as tl
    from triton.runtime.interpreter import ReduceOps

    before = ReduceOps.sum
    lanes = np.full((2, 128), 2.0**-24, np.float32)
    lanes[:, 0] = 1.0
    with summed_as_on_a_gpu():
        reduce = ReduceOps(axis, tl.standard._sum_combine, keep_dims)
        total = reduce.sum(reduce.to_tensor(lanes, tl.float32)).handle.data
    assert ReduceOps.sum is before
    assert total.shape == shape
    assert (total == 1 + 63 * 2.0**-23).all()


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    assert len(versions.commit().removesuffix("+changes")) in (12, len("unknown"))
    monkeypatch.setattr(versions, "__file__", str(tmp_path / "versions.py"))
    assert versions.commit() == "unknown"


def test_numbers_are_short():
    shown = [short(x) for x in (0, 3.14159e-8, 0.012345, 0.94, 9.44, 51.2, 13935.4, 2.3e5)]
    assert shown == ["0", "3e-8", "0.012", "0.94", "9.4", "51", "13,935", "2e5"]
