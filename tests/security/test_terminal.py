"""Text from a model reaches no terminal as a command, and no report as an invisible sign."""

import dataclasses
import json

import pytest

from kl_kernels import cli
from kl_kernels.lab.ppo.config import PPOConfig
from kl_kernels.lab.ppo.report import MetricsLog, summary
from kl_kernels.lab.ppo.reward import compute_scores
from kl_kernels.lab.study.plan import Plan, StudyFolder
from kl_kernels.lab.study.report import samples_table
from kl_kernels.lab.study.runs import ChildFailed, jobs_of, run_all
from kl_kernels.text import printable

HOSTILE = [
    "\x1b]0;title\x07",
    "\x1b[2J\x1b[H",
    "\x9b2J",  # ESC [ in one byte
    "\x90payload\x9c",
    "a\x08\x08\x7f",
    "\x00",
    "\r overwritten",
    "\u202egnp.exe",  # right to left
    "a\u200bb\ufeff",
    "\u2028\u2029\x85",
    "\ue000\U000f0000",
]


def assert_harmless(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text), ascii(text)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_is_not_visible_is_escaped(text):
    assert_harmless(printable(text))


def test_what_is_visible_stays_as_it_is():
    text = "two lines\nof text: ünï, 汉字, 🙂, \\x1b spelt out, `$<>&"
    assert printable(text) == text
    assert printable("\x1b[2J") == r"\x1b[2J"
    assert printable("\u202e\U000e0001") == r"\u202e\U000e0001"


def record(sample: str) -> dict:
    numbers = dict.fromkeys(
        ["update", "proxy", "proxy_sd", "gold", "kl", "kl_coef", "entropy", "length"], 1.0
    )
    return numbers | {"sample": sample}


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_samples_are_printed_escaped(text):
    """The end of a run, which is its table.txt, too."""
    drift = {"tokens": [{"text": text, "share": 0.5}]}
    assert_harmless(summary(PPOConfig(), [record(f"prompt {text} | {text}")], drift))


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_samples_of_a_report_are_escaped(text):
    answers = {text: {"text": text, "proxy": 1.5, "gold": 2.5}}
    table = samples_table({"samples": [{"prompt": text, "answers": {"policy": answers[text]}}]})
    for cell in table.rows[0]:
        assert_harmless(cell)
        assert "\n" not in cell


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_metrics_hold_samples_escaped_as_json_has_them(tmp_path, text):
    MetricsLog(tmp_path / "metrics.jsonl", keep=0).append(record(text))
    written = (tmp_path / "metrics.jsonl").read_text()
    assert_harmless(written)
    assert json.loads(written)["sample"] == text


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_errors_are_printed_escaped(tmp_path, text, capsys):
    """Errors quote an answer, a folder's configuration, and its files' names."""
    with pytest.raises(ValueError, match="returned None") as error:
        compute_scores(lambda prompts, answers: [None], ["p"], [text])
    assert_harmless(str(error.value))
    (tmp_path / "config.json").write_text(json.dumps({text: 1}))
    assert cli.main(["ppo", "--resume", str(tmp_path)]) == 2
    if "\x00" not in text:
        (tmp_path / text).symlink_to("/")
        assert cli.main(["ppo", "--resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: resume is ")
    assert_harmless(said)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_the_end_of_a_failed_run_s_log_is_printed_escaped(tmp_path, text):
    study, plan = StudyFolder(tmp_path), Plan(PPOConfig(), betas=("0",), n_seeds=1)
    (tmp_path / "logs").mkdir()
    start = jobs_of(plan, study)[0]
    failing = dataclasses.replace(start, command=("kl_kernels_is_not_here",))
    start.log.write_text(f"before {text} after\n", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kl_kernels.lab.study.runs.jobs_of", lambda *_: [failing])
        with pytest.raises(ChildFailed, match="after") as error:
            run_all(plan, study, 1)
    assert_harmless(str(error.value))
