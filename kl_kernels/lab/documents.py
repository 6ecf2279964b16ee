"""A document as a list of blocks, which is written in HTML or in Markdown.

`code` stands between backticks in every text; everything else is plain.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    name: str  # PNG or SVG, by its name
    text: str  # the caption


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


PNG = b"\x89PNG"
Block = Heading | Text | Bullets | Picture | Table


def to_html(title: str, blocks: Sequence[Block], pictures: Mapping[str, bytes]) -> str:
    """Return a self-contained page: pictures are embedded, and there are no scripts."""
    template = Template(resources.files(__package__).joinpath("report.html").read_text("utf-8"))
    body = "\n".join(_html(block, pictures) for block in blocks)
    return template.substitute(title=html.escape(title), body=body)


def _html(block: Block, pictures: Mapping[str, bytes]) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_inline(text)}</h2>"
        case Text(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(items):
            return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in items) + "</ul>"
        case Picture(name, text):
            data = pictures[name]
            kind = "png" if data.startswith(PNG) else "svg+xml"
            source = f"data:image/{kind};base64," + base64.b64encode(data).decode()
            caption = f"<figcaption>{_inline(text)}</figcaption>"
            alt = html.escape(text.replace("`", ""))
            return f'<figure><img src="{source}" alt="{alt}">{caption}</figure>'
        case Table(header, rows):
            head = "".join(f"<th>{_inline(cell)}</th>" for cell in header)
            body = "".join(
                "<tr>" + "".join(f"<td>{_inline(cell)}</td>" for cell in row) + "</tr>"
                for row in rows
            )
            return f"<div><table><tr>{head}</tr>{body}</table></div>"


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    return re.sub(r"\*\*([^*]+)\*\*", r"<b>\1</b>", text)


def to_markdown(title: str, blocks: Sequence[Block], folder: str, *, suffix: str = ".png") -> str:
    """Return Markdown with pictures as files in `folder`; an empty title has no heading."""
    parts = [f"# {title}"] if title else []
    return "\n\n".join([*parts, *(_markdown(block, folder, suffix) for block in blocks)]) + "\n"


def _markdown(block: Block, folder: str, suffix: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Text(text):
            return text
        case Bullets(items):
            return "\n".join(f"- {item}" for item in items)
        case Picture(name, text):
            return f"![{text.replace('`', '')}]({folder}/{name}{suffix})\n\n*{text}*"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            # A backslash would take the one put before what follows it; "](" makes links.
            cells = ([re.sub(r"([\\|<>]|(?<=\])\()", r"\\\1", c) for c in line] for line in lines)
            return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def to_text(table: Table) -> str:
    """Return the table for a terminal."""
    rows = [list(table.header), *map(list, table.rows)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
        for row in rows
    )
