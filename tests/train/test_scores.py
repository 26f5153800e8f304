"""Scores of text: worked by hand, and what must hold for any text."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.train.scores import exact_match, macro_f1, rouge_l, rouge_n, token_f1


@pytest.mark.parametrize(
    ("score", "expected", "written", "value"),
    [
        (exact_match, "The cat.", "cat", 1.0),
        (exact_match, "cat", "cats", 0.0),
        (token_f1, "the red cat", "a red dog", 0.5),  # 1 of 2 words, both ways
        (token_f1, "red red cat", "red", 2 * 1 / (1 + 3)),
        (token_f1, "", "", 1.0),
        (token_f1, "cat", "", 0.0),
        # Lin 2004: S2 and S3 against S1, where order tells them apart: LCS 3 and 2 of 4 words
        (rouge_l, "police killed the gunman", "police kill the gunman", 0.75),
        (rouge_l, "police killed the gunman", "the gunman kill police", 0.5),
        (rouge_l, "", "x", 0.0),
    ],
)
def test_by_hand(score: object, expected: str, written: str, value: float) -> None:
    assert callable(score)
    assert score(expected, written) == pytest.approx(value)


@given(st.text(alphabet="ab c.", max_size=12), st.text(alphabet="ab c.", max_size=12))
def test_between_0_and_1_and_symmetric(first: str, second: str) -> None:
    for score in (exact_match, token_f1, rouge_l):
        value = score(first, second)
        assert 0 <= value <= 1
        assert value == score(second, first)
        assert exact_match(first, first) == 1


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    for expected, written in TEXTS:
        theirs = scorer.score(expected, written)
        assert rouge_n(expected, written, 1) == pytest.approx(theirs["rouge1"].fmeasure)
        assert rouge_n(expected, written, 2) == pytest.approx(theirs["rouge2"].fmeasure)
        assert rouge_l(expected, written) == pytest.approx(theirs["rougeL"].fmeasure)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    generator = random.Random(0)
    for classes in (2, 3, 5):
        expected, predicted = (generator.choices("abcde"[:classes], k=40) for _ in range(2))
        assert macro_f1(expected, predicted) == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert macro_f1(["a", "a"], ["b", "b"]) == 0.0


def test_runs_of_words() -> None:
    assert rouge_n("the cat sat", "the cat ran", 2) == pytest.approx(0.5)
    assert rouge_n("the the cat", "the", 1) == pytest.approx(0.5)
    assert rouge_n("", "the", 1) == rouge_n("one", "one", 2) == 0.0
    assert macro_f1(["a", "b", "b"], ["a", "b", "a"]) == pytest.approx(2 / 3)


TEXTS = [
    ("the cat sat on the mat", "a cat sat on the old mat"),
    ("It's 3 o'clock; the END.", "its three o clock the end"),
    ("one", "one"),
    ("one two", "two one"),
    ("", "something"),
    ("Ünïcode words héré", "unicode words here"),
    ("a b c d e f g", "g f e d c b a"),
]
