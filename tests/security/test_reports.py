"""Text from people and language models stays text in a report: no tag, no link, no picture."""

from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from kl_kernels.lab.documents import Bullets, Heading, Picture, Table, Text, to_html, to_markdown
from kl_kernels.lab.study.report import samples_table

PNG = b"\x89PNG\r\n\x1a\n"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "&lt;script&gt;",
    "</td></table></body><iframe src=//x>",
    "$body ${title} $$",
    "\\<img src=x onerror=alert(1)//\\>",
    "\\\\<img src=x onerror=alert(1)//>",
    "a \\| b | c",
    "[text](javascript:alert(1))",
    "\\[text](http://somewhere)",
    "![text](http://somewhere/x.png)",
    "[a]\\(b)",
    "<http://somewhere>",
    "`<b>` **bold** `",
    "ends in \\",
    "# heading\n\n- item\n\n<div>",
]


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, frozenset[str]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, frozenset(name for name, _ in attrs)))

    def handle_data(self, data):
        self.text += data


def samples(text: str) -> Table:
    answers = {"policy": {"text": text, "proxy": 1.5, "gold": 2.5}}
    return samples_table({"samples": [{"prompt": text, "answers": answers}]})


def page(text: str) -> str:
    blocks = [
        Heading(text),
        Text(text),
        Bullets([text]),
        Picture("p", text),
        Table([text], [[text]]),
        samples(text),
    ]
    return to_html(text, blocks, {"p": PNG})


@pytest.mark.parametrize("text", HOSTILE)
def test_text_is_no_tag_of_the_page(text):
    tags = Tags(page(text))
    ours = [tag for tag in tags.found if tag[0] not in ("b", "code")]  # the two of our own markup
    assert ours == Tags(page("harmless")).found
    assert {attributes for tag, attributes in tags.found if tag in ("b", "code")} <= {frozenset()}
    assert text.replace("`", "").replace("**", "") in tags.text.replace("`", "").replace("**", "")


@pytest.mark.parametrize("text", HOSTILE)
def test_a_sample_in_a_markdown_table_is_text_in_its_cell(text):
    document = to_markdown("", [samples(text)], "study")
    parsed = MarkdownIt("commonmark").enable("table").parse(document)
    kinds = [token.type for token in parsed]
    assert (kinds.count("td_open"), kinds.count("tr_open")) == (2, 2)
    inline = {child.type for token in parsed for child in token.children or ()}
    assert inline <= {"text", "text_special"}
    assert not {kind for kind in kinds if "html" in kind or "heading" in kind}
    cell = "".join(child.content for child in parsed[kinds.index("td_open") + 1].children)
    plain = " ".join(text.split()).translate(str.maketrans("`*", "'·"))
    assert cell == plain.replace("&lt;", "<").replace("&gt;", ">")
