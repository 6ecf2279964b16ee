"""Docstrings and comments begin with a verb or a noun, and say "must"."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Files and folders that are checked. Add a name to check another; "kl_kernels" would be all of it.
CHECKED = [
    "kl_kernels/rl",
    "kl_kernels/monitor",
    "kl_kernels/integrations",
    "kl_kernels/lab/study",
    "kl_kernels/lab/validate",
    "kl_kernels/lab/codegen",
    "kl_kernels/lab/bench.py",
    "kl_kernels/lab/documents.py",
    "kl_kernels/cli.py",
    "kl_kernels/extras.py",
    "kl_kernels/files.py",
    "kl_kernels/forks.py",
    "kl_kernels/info.py",
    "kl_kernels/text.py",
    "kl_kernels/versions.py",
    "bench",
    "examples",
    "tests",
]
LEFT_OUT = ["tests/lab/ppo"]

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
        if FORBIDDEN_START.match(words) or OLD_DUTY.search(words):
            found.append(f"line {line}: {words[:100]}")
    return found


def checked_files():
    for name in CHECKED:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            relative = file.relative_to(ROOT)
            if not any(relative.is_relative_to(folder) for folder in LEFT_OUT):
                yield relative.as_posix()


@pytest.mark.parametrize("file", checked_files())
def test_words(file):
    assert not objections((ROOT / file).read_text(encoding="utf-8"))
