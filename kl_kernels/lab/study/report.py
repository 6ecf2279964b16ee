"""The text of a study's report, section by section; every number comes from `analysis.py`."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from kl_kernels.files import write_bytes, write_text
from kl_kernels.lab.documents import (
    Block,
    Bullets,
    Heading,
    Picture,
    Table,
    Text,
    to_html,
    to_text,
)
from kl_kernels.lab.ppo.report import one_line
from kl_kernels.lab.study.analysis import analyse
from kl_kernels.lab.study.claims import Claim, times, what_is_clear
from kl_kernels.lab.study.figures import DPI, pictures
from kl_kernels.lab.study.outcomes import WINDOW
from kl_kernels.lab.study.plan import Plan, StudyFolder, described
from kl_kernels.lab.study.statistics import interval_of

Data = Mapping[str, Any]

TITLE = "Reward hacking, and what a KL penalty does about it"
COLUMN_TITLES = {
    "proxy": "proxy",
    "gold": "gold",
    "gold_peak": "gold peak",
    "gold_drop": "drop from peak",
    "kl": "KL [nats]",
    "entropy": "entropy [nats/token]",
    "length": "length [tokens]",
}


def write_report(plan: Plan, study: StudyFolder) -> str:
    """Write report.html, report.json and the pictures; return the text for the terminal."""
    data = analyse(plan, study)
    pngs = draw(data)
    for name, png in pngs.items():
        write_bytes(study.picture(name), png)
    write_text(study.data, json.dumps(data, indent=1) + "\n")
    write_text(study.report, to_html(TITLE, contents(data), pngs))
    verdicts = "\n".join(f"- {claim}" for claim in claims_of(data))
    note = f"{_table_note(data)} {what_is_clear(data['n_seeds'])}"
    return f"\n{to_text(penalty_table(data))}\n\n{note}\n\n{verdicts}\n\nreport: {study.report}"


def draw(data: Data) -> dict[str, bytes]:
    """The pictures as PNGs."""
    pngs = {}
    for name, figure in pictures(data).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        pngs[name] = buffer.getvalue()
    return pngs


def contents(data: Data) -> list[Block]:
    seeds = f"{data['n_seeds']} seeds" if data["n_seeds"] > 1 else "one seed"
    blocks: list[Block] = []
    if data["overoptimisation"]:
        blocks.append(Picture("overoptimisation", _overoptimisation_caption(data)))
    blocks += [
        Text(
            "A small language model is trained with PPO to please a reward model, the proxy, that "
            "was fitted to noisy preferences and is blind to order and repetition. The gold score "
            "is what the preferences were about; it is reported and never trained on. Where the "
            "proxy rises and gold falls, the reward is being hacked. The KL penalty, beta nats to "
            f"the score, is all that differs between runs ({seeds}, {data['updates']} updates)."
        ),
        Heading("Conclusions"),
        Text(what_is_clear(data["n_seeds"])),
        Bullets([f"**{c.claim}: {c.verdict}.** {c.evidence}" for c in claims_of(data)]),
        Heading("Sensitivity to beta"),
        penalty_table(data),
        Text(_table_note(data)),
        Heading("Learning curves"),
        Picture(
            "learning_curves",
            "Proxy and gold over the updates. " + _band_note(data) + " Dotted: gold at the start.",
        ),
        Picture(
            "control",
            "KL and beta over the updates. Thick: mean over seeds; thin: each seed.",
        ),
    ]
    if data["samples"]:
        blocks += [
            Heading("The same prompts, answered"),
            Text(
                "Sampled answers of the first seed's final policies, with the same random numbers, "
                "and in brackets their proxy and gold scores."
            ),
            samples_table(data),
        ]
    if data["estimators"]:
        blocks += _estimator_blocks(data)
    return blocks


def claims_of(data: Data) -> list[Claim]:
    return [Claim(**claim) for claim in data["claims"]]


def _overoptimisation_caption(data: Data) -> str:
    points = "every update of every seed" if data["n_seeds"] > 1 else "every update"
    return (
        f"First panel: without a KL penalty, {points}. Line: the form of Gao et al. "
        "(2023), fitted to gold, with its peak (diamond) beside the observed one (star). It is not "
        "drawn for the proxy, which need not follow it. Second panel: gold on each beta's way, "
        f"and the mean of its last {WINDOW} updates."
    )


def _band_note(data: Data) -> str:
    if data["n_seeds"] < 2:
        return "One seed, so without bands."
    return f"Mean and 95 % t-interval over {data['n_seeds']} seeds."


def penalty_table(data: Data) -> Table:
    rows = [["start", *(_cell(data["start"].get(name)) for name in COLUMN_TITLES)]]
    for beta, row in data["table"].items():
        rows.append([described(beta), *(_cell(row[name]) for name in COLUMN_TITLES)])
    return Table(["KL penalty", *COLUMN_TITLES.values()], rows)


def _cell(stored: Any) -> str:
    return "" if stored is None else str(interval_of(stored))


def _table_note(data: Data) -> str:
    intervals = (
        f", with 95 % t-intervals over {data['n_seeds']} seeds"
        if data["n_seeds"] > 1
        else " of one seed, so without intervals"
    )
    return (
        f"Means over the last {WINDOW} updates{intervals}. The gold peak is the highest mean of "
        f"{WINDOW} updates in a row; being selected, it is biased up, and so is the drop from it."
    )


def samples_table(data: Data) -> Table:
    names = list(data["samples"][0]["answers"])
    rows = [
        [_plain(sample["prompt"])]
        + [
            f"{_plain(answer['text'])} [{answer['proxy']:.1f}, {answer['gold']:.1f}]"
            for answer in sample["answers"].values()
        ]
        for sample in data["samples"]
    ]
    return Table(["prompt", *names], rows)


def _plain(text: str) -> str:
    """Replace what would be markup in the text of a language model or of a file of prompts."""
    return one_line(text).translate(str.maketrans("`*", "'·"))


def _estimator_blocks(data: Data) -> list[Block]:
    levels = sorted(data["estimators"].items(), key=lambda item: item[1]["kl"]["mean"])
    rows = []
    for beta, level in levels:
        kl = level["kl"]["mean"]
        row = [described(beta), f"{kl:.3g}", f"{level['sd_exact']:.3g}"]
        row += [times(interval_of(e["variance_ratio"])) for e in level["estimators"].values()]
        row += [_bias(e["bias"], kl) for e in level["estimators"].values()]
        rows.append(row)
    names = list(levels[0][1]["estimators"])
    cost = data["cost"]
    return [
        Heading("Estimators of the KL"),
        Picture(
            "estimators",
            "First panel: variance of each estimator of an answer's KL over that of exact KL per "
            "token. Second panel: bias. Intervals of 95 %: bootstrap for variances, t for biases. "
            "k3's heavy "
            "tail makes its own intervals too narrow at large KL. Each interval is for itself; of "
            "many, some miss.",
        ),
        Table(
            [
                "policy",
                "KL [nats]",
                "sd of exact",
                *(f"variance of {n} / exact" for n in names),
                *(f"bias of {n}" for n in names),
            ],
            rows,
        ),
        Text(
            f"{levels[0][1]['n']} answers of each policy of the first seed; d is the log-ratio of "
            "a sampled token, k1 = d, k2 = d²/2, k3 = exp(-d) - 1 + d, exact the sum over the "
            "vocabulary; all summed over an answer. Bias is the mean difference from exact."
        ),
        Table(
            ["what it costs", "time", "over the first"],
            [
                [name, f"{c['ms']:.1f} ms", f"{c['ratio']:.2f}x"]
                for name, c in cost["contenders"].items()
            ],
        ),
        Text(
            f"{cost['tokens']} tokens, V = {cost['vocab_size']}, float32, {cost['threads']} "
            "thread(s), medians of interleaved rounds. All read the logits of both models, "
            f"{cost['mb_of_logits']:.0f} MB: a sampled token's log-probability takes the whole row "
            "for its normaliser. So exact KL needs nothing that k1 does not read."
        ),
        Heading("A reward needs more than a value"),
        Text(
            "Exact KL at a token does not depend on which token was sampled, so as a reward alone "
            "it never tells the policy to sample another one. Below is the expected policy "
            "gradient of each form beside the gradient of E[score] - beta KL(sequence), by "
            "enumerating all answers over 4 tokens and 3 steps in float64, through the functions "
            "that a trainer calls. Three forms are right: k1; exact with `advantage_correction`; "
            "exact with the differentiable KL in the loss."
        ),
        Table(
            ["form of the KL penalty", "relative error", "cosine"],
            [
                [name, f"{form['relative_error']:.1g}", f"{form['cosine']:.3f}"]
                for name, form in data["gradients"].items()
            ],
        ),
    ]


def _bias(stored: Any, kl: float) -> str:
    bias = interval_of(stored)
    if bias.low is None or bias.high is None or not kl > 0:
        return f"{bias.mean:.2g}"
    return f"{bias.mean / kl:+.1%} ± {(bias.high - bias.low) / 2 / kl:.1%}"
