"""The embedded task, to write about Python: its text, and the gold score of an answer.

The text is the language reference that every CPython carries for its own help(); it differs a
little from version to version, so nothing here depends on its exact words.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise

N_TOPIC_WORDS = 60

# English function words of four letters and more; shorter words never count as content.
_FUNCTION_WORDS = """
    about also although another because been before being both cannot could does each either
    else even every from have here however into itself just like made make many more most much
    must neither only other otherwise over same several should since some such than that their
    them themselves then there therefore these they this those though thus under unless until
    upon using very well were what when whenever where whether which while will with within
    without would your
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def load_corpus() -> list[str]:
    """Load paragraphs of prose, one line each, in a fixed order and without repetitions.

    Raises:
        ValueError: this Python was installed without its help texts.
    """
    try:
        topics: dict[str, str] = import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError(
            "the embedded task learns English from Python's own help texts, but this Python has no "
            f"module pydoc_data.topics ({error}); install a complete standard library, or pass "
            "--model, --prompts and --reward"
        ) from error
    paragraphs = (
        " ".join(paragraph.split())
        for topic in sorted(topics)
        for paragraph in re.split(r"\n\s*\n", topics[topic])
    )
    return list(dict.fromkeys(p for p in paragraphs if _is_prose(p)))


def _is_prose(paragraph: str) -> bool:
    """Tell prose from headings, code and grammar: it is long, and letters for the most part."""
    letters = sum(character.isalpha() for character in paragraph)
    return len(paragraph) >= 60 and letters >= 0.68 * len(paragraph)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def is_content(word: str) -> bool:
    return len(word) >= 4 and word not in FUNCTION_WORDS


@dataclass(frozen=True)
class GoldScore:
    """The true worth of an answer. It is reported, and labels preferences; nothing trains on it.

    Up to 4 points for naming topics, up to 3 for wording that occurs in the corpus, and up to -4
    for repeating oneself. The reward model sees which tokens an answer holds but not their order,
    so wording and repetition are its blind spot.
    """

    topic_words: frozenset[str]
    bigrams: frozenset[tuple[str, str]]  # adjacent words in the corpus

    @classmethod
    def of_corpus(cls, paragraphs: list[str]) -> GoldScore:
        counts: Counter[str] = Counter()
        bigrams: set[tuple[str, str]] = set()
        for paragraph in paragraphs:
            words = words_of(paragraph)
            counts.update(filter(is_content, words))
            bigrams.update(pairwise(words))
        topic_words = frozenset(word for word, _ in counts.most_common(N_TOPIC_WORDS))
        return cls(topic_words, frozenset(bigrams))

    def __call__(self, answer: str) -> float:
        words = words_of(answer)
        if len(words) < 2:
            return 0.0
        topics = len(self.topic_words.intersection(words))
        pairs = list(pairwise(words))
        # A doubled word never counts as wording, even if the corpus has it as a slip.
        idiomatic = sum(a != b and (a, b) in self.bigrams for a, b in pairs) / len(pairs)
        content = [word for word in words if is_content(word)]
        repeated = 1 - len(set(content)) / len(content) if content else 0.0
        return min(topics, 8) / 2 + 3 * idiomatic - 4 * repeated
