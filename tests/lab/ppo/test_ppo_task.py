"""Facts about the corpus and the gold score."""

import sys

import pytest

from kl_kernels.lab.ppo.task import N_TOPIC_WORDS, GoldScore, is_content, load_corpus, words_of


@pytest.fixture(scope="module")
def gold():
    return GoldScore(
        topic_words=frozenset({"class", "object", "value", "method"}),
        bigrams=frozenset({("the", "class"), ("class", "object"), ("value", "value")}),
    )


def test_corpus_is_plentiful_clean_and_in_a_fixed_order():
    corpus = load_corpus()
    assert corpus == load_corpus()
    assert len(corpus) == len(set(corpus)) > 800
    assert all(len(p) >= 60 and p == " ".join(p.split()) for p in corpus)


def test_gold_of_the_corpus_prefers_its_own_text_to_hacks():
    corpus = load_corpus()
    gold = GoldScore.of_corpus(corpus)
    assert len(gold.topic_words) == N_TOPIC_WORDS
    assert all(is_content(word) for word in gold.topic_words)
    text = sum(gold(" ".join(p.split()[8:48])) for p in corpus) / len(corpus)
    shuffled = sum(gold(" ".join(sorted(p.split()[8:48]))) for p in corpus) / len(corpus)
    hacked = gold("instance " * 40)
    assert hacked < 0 < shuffled < text


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("", 0.0),
        ("class", 0.0),  # fewer than two words
        ("The class.", 0.5 + 3 * 1),  # one topic; its one pair occurs
        ("class the", 0.5),  # order matters
        ("the class object", 1.0 + 3 * 1),
        ("value value", 0.5 - 4 * 0.5),  # a doubled word is no wording, and half is repetition
        ("the and the and", 0.0),  # no content words, so none repeated
        ("class class class class", 0.5 - 4 * 0.75),
    ],
)
def test_gold_by_hand(gold, answer, score):
    assert gold(answer) == pytest.approx(score, abs=1e-12)


def test_topics_count_up_to_eight():
    topics = [f"topic{letter * 2}" for letter in "abcdefghij"]
    gold = GoldScore(frozenset(topics), frozenset())
    assert gold(" ".join(topics[:5])) == 2.5
    assert gold(" ".join(topics)) == 4.0


def test_words_are_lower_case_letters():
    assert words_of('The "__add__()" method-call x86') == ["the", "add", "method", "call", "x"]


def test_a_python_without_help_texts_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"no module pydoc_data\.topics"):
        load_corpus()
