"""The report: one self-contained file, with the data's own numbers and verdicts."""

import re

import pytest
from synthetic import CONSTANTS, as_expected, estimates, hacked, run

from kl_kernels.lab.documents import Bullets, Picture, Table, Text, to_html, to_markdown, to_text
from kl_kernels.lab.study.analysis import analyse_records
from kl_kernels.lab.study.report import TITLE, contents, draw

ANSWER = {"text": "<script>alert(1)</script> a|b `c` **d**", "proxy": 1.5, "gold": 2.5}
PNG = b"\x89PNG\r\n\x1a\n"


def whole(records):
    return analyse_records(CONSTANTS, records, estimates()) | {
        "seeds": [0],
        "cost": {
            "tokens": 2560,
            "vocab_size": 2048,
            "mb_of_logits": 42.0,
            "threads": 2,
            "contenders": {"`token_kl`": {"ms": 4.0, "ratio": 1.0}},
        },
        "gradients": {"k1 in the reward": {"relative_error": 5e-16, "cosine": 1.0}},
        "samples": [
            {"prompt": "A class", "answers": {"reference": ANSWER}},
        ],
    }


@pytest.fixture(scope="module")
def full():
    data = whole(as_expected())
    return data, draw(data)


def test_the_page_opens_with_the_picture_and_needs_nothing_else(full):
    data, pngs = full
    page = to_html(TITLE, contents(data), pngs)
    assert re.search(r"</h1>\s*<figure><img", page)
    assert page.count("<img") == len(pngs) == 4
    assert all(
        source.startswith("data:image/png;base64,") for source in re.findall(r'src="([^"]*)"', page)
    )
    text = re.sub(r'src="[^"]*"', "", page)
    assert not re.search(r"<script|<link|https?:|@import|url\(", text)


def test_pictures_are_pngs(full):
    assert all(png.startswith(PNG) and len(png) > 10_000 for png in full[1].values())


def test_verdicts_on_the_page_are_the_data_s(full):
    page = to_html(TITLE, contents(full[0]), full[1])
    assert page.count(": holds.</b>") == 8
    assert "does not hold" not in page
    changed = whole(as_expected() | {"adaptive": [run(gold_end=3.0, kl_end=30.0)] * 3})
    page = to_html(TITLE, contents(changed), full[1])
    assert page.count(": holds.</b>") == 6
    refused = re.findall(r"<b>([^<]*): does not hold\.</b>", page)
    assert [claim[:16] for claim in refused] == ["The adaptive con", "Adaptive beta ke"]


def test_the_table_has_a_row_for_the_start_and_each_beta(full):
    (table,) = [
        b for b in contents(full[0]) if isinstance(b, Table) and b.header[0] == "KL penalty"
    ]
    assert [row[0] for row in table.rows] == [
        "start",
        "beta = 0",
        "beta = 0.03",
        "beta = 0.1",
        "beta = 5",
        "adaptive beta",
    ]
    gold = dict(zip(table.header, table.rows[1]))["gold"]
    assert gold == "-2.00 ± 0.50"  # -2.2, -2, -1.8: 0.2 x 4.303 / sqrt(3)


def test_two_runs_of_one_seed_and_runs_without_beta_0_have_reports_too():
    for records, n_pictures in (
        ({"0": [hacked()], "adaptive": [run(gold_end=4.8)]}, 4),
        ({"0.1": [run(gold_end=4.8)], "1": [run(gold_end=3.0)]}, 3),
    ):
        data = whole(records)
        blocks = contents(data)
        pngs = draw(data)
        assert len(pngs) == n_pictures
        assert {block.name for block in blocks if isinstance(block, Picture)} == set(pngs)
        page = to_html(TITLE, blocks, pngs)
        assert "not tested" in page
        assert "one seed" in page


def test_what_a_language_model_writes_is_no_markup(full):
    page = to_html(TITLE, contents(full[0]), full[1])
    assert "&lt;script&gt;alert(1)&lt;/script&gt; a|b &#x27;c&#x27; ··d·· [1.5, 2.5]" in page
    document = to_markdown(TITLE, contents(full[0]), "study")
    assert "\\<script\\>alert(1)\\</script\\> a\\|b 'c' ··d··" in document


def test_markdown_has_tables_bullets_and_pictures_as_files():
    blocks = [
        Picture("a", "of `b`"),
        Text("t"),
        Bullets(["x", "y"]),
        Table(["h", "i"], [["1", "2"]]),
    ]
    assert to_markdown("T", blocks, "dir") == (
        "# T\n\n![of b](dir/a.png)\n\n*of `b`*\n\nt\n\n- x\n- y\n\n"
        "| h | i |\n| --- | --- |\n| 1 | 2 |\n"
    )


def test_text_tables_are_aligned():
    assert to_text(Table(["a", "bb"], [["ccc", "1"]])) == "a    bb\nccc   1"
