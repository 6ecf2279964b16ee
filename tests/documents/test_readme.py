"""Figures in README.md and docs/ are those of the committed results files."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text()


def test_the_documents_say_what_the_results_files_say():
    done = subprocess.run(
        [sys.executable, "-m", "bench.readme", "--check"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, "run `python -m bench.readme`"


def results(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def test_the_readme_is_short():
    text = re.sub(r"```.*?```|<!--.*?-->|(?<=\])\([^)]*\)", " ", README, flags=re.DOTALL)
    assert len([word for word in text.split() if re.search(r"\w", word)]) <= 600
    example = README.partition("```python\n")[2].partition("```")[0]
    assert len(example.splitlines()) <= 12


def test_the_readmes_example_needs_nothing_from_elsewhere():
    exec(README.partition("```python\n")[2].partition("```")[0], {})


def test_the_readme_says_that_no_gpu_was_measured_until_one_is():
    measured = any(RESULTS.glob("gpu_*.json"))
    assert measured != ("**have not yet run on a GPU**" in README)


def test_the_readme_says_what_the_study_shows():
    study = results("study")
    assert "of seven KL\npenalties" in README
    assert len(study["table"]) == 7
    assert study["claims"][0]["claim"].startswith("Without a penalty")
    assert study["claims"][0]["holds"]
    assert study["table"]["0"]["gold"]["mean"] < study["start"]["gold"]["mean"]


def test_one_pass_reads_each_logit_once():
    """A policy loss with an exact KL reads two tensors: the policy's and the reference's."""
    assert "one pass reads each logit once" in README
    assert results("traffic")["tensors"]["one visit"]["read"] == pytest.approx(2, rel=0.05)


def test_the_readme_says_who_is_faster():
    cases = {}
    for m in results("linear")["measurements"]:
        case = cases.setdefault(m["dtype"], {}).setdefault((m["job"], m["size"]), [])
        case.append(m["contender"] != "kl_kernels" and m["ratio"] < 1)
    said = ", ".join(
        f"{sum(map(any, of.values()))} of {len(of)} cases in {dtype}" for dtype, of in cases.items()
    )
    assert f"Another is faster than kl_kernels in {said}." in README
