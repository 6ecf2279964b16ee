"""Docstrings and comments begin with a verb or a noun, and say "must"."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHECKED = ["kl_kernels", "bench", "examples", "tests"]

FORBIDDEN_START = re.compile(r"(of|what|likewise|which|how)\b", re.IGNORECASE)
OLD_DUTY = re.compile(r"\b(has|have|had) to\b", re.IGNORECASE)


def docstrings(source):
    """Yield the line and text of each docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            yield node.body[0].lineno, text


def comments(source):
    """Yield the line and text of each comment; adjacent lines of equal indentation are one."""
    end, text = (0, 0), ""
    start = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, column = token.start
        words = token.string.lstrip("#! ")
        if (line - 1, column) == end and token.line.lstrip().startswith("#"):
            text = f"{text} {words}"
        else:
            if text:
                yield start, text
            start, text = line, words
        end = (line, column)
    if text:
        yield start, text


def objections(source):
    """List the line and the words of each docstring or comment that breaks a rule."""
    found = []
    for line, text in [*docstrings(source), *comments(source)]:
        words = " ".join(text.split())
        if FORBIDDEN_START.match(words):
            found.append(f"line {line}: {words[:100]}")
    return found


def test_words():
    found = [
        f"{file.relative_to(ROOT)}, {objection}"
        for name in CHECKED
        for file in sorted((ROOT / name).rglob("*.py"))
        for objection in objections(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_messages_and_comments_say_must():
    sources = [file for name in CHECKED for file in (ROOT / name).rglob("*.py")]
    sources += (ROOT / "csrc").rglob("*.*")
    found = [
        f"{file.relative_to(ROOT)}, line {number}: {line.strip()}"
        for file in sorted(sources)
        if file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if OLD_DUTY.search(line)
    ]
    assert not found, "\n".join(found)
