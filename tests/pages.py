"""The code of a document, to be run where the document says it runs."""

from pathlib import Path

from markdown_it import MarkdownIt

DOCS = Path(__file__).parent.parent / "docs"


def blocks_of(page, language="py", containing=""):
    """Compiled, in order; a traceback shows the page's lines."""
    path = DOCS / page
    fences = [t for t in MarkdownIt().parse(path.read_text()) if t.type == "fence"]
    return [
        compile("\n" * (t.map[0] + 1) + t.content, str(path), "exec")
        for t in fences
        if t.info.split()[:1] == [language] and containing in t.content
    ]
