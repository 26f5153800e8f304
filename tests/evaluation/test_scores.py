"""Scores of text: computed by hand, and properties that hold for any text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from rightrank.decision.comparison import compute_file_bounds
from rightrank.evaluation.answers import score_exact_match, score_macro_f1, score_rouge_l, score_token_f1


@pytest.mark.parametrize(
    ("score", "expected", "written", "value"),
    [
        (score_exact_match, "The cat.", "cat", 1.0),
        (score_exact_match, "cat", "cats", 0.0),
        (score_token_f1, "the red cat", "a red dog", 0.5),  # 1 of 2 words, both ways
        (score_token_f1, "red red cat", "red", 2 * 1 / (1 + 3)),
        (score_token_f1, "", "", 1.0),
        (score_token_f1, "cat", "", 0.0),
        # Lin 2004: S2 and S3 against S1, where order tells them apart: LCS 3 and 2 of 4 words
        (score_rouge_l, "police killed the gunman", "police kill the gunman", 0.75),
        (score_rouge_l, "police killed the gunman", "the gunman kill police", 0.5),
        (score_rouge_l, "", "x", 0.0),
    ],
)
def test_by_hand(score: object, expected: str, written: str, value: float) -> None:
    assert callable(score)
    assert score(expected, written) == pytest.approx(value)


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for expected, written in TEXTS:
        theirs = scorer.score(expected, written)
        assert score_rouge_l(expected, written) == pytest.approx(theirs["rougeL"].fmeasure)


def test_macro_f1_is_that_of_scikit_learn() -> None:
    f1_score = pytest.importorskip("sklearn.metrics").f1_score
    generator = random.Random(0)
    for classes in (2, 3, 5):
        expected, predicted = (generator.choices("abcde"[:classes], k=40) for _ in range(2))
        assert score_macro_f1(expected, predicted)[0] == pytest.approx(f1_score(expected, predicted, average="macro"))
    assert score_macro_f1(["a", "a"], ["b", "b"])[0] == 0.0


TEXTS = [
    ("the cat sat on the mat", "a cat sat on the old mat"),
    ("It's 3 o'clock; the END.", "its three o clock the end"),
    ("one", "one"),
    ("one two", "two one"),
    ("", "something"),
    ("Ünïcode words héré", "unicode words here"),
    ("a b c d e f g", "g f e d c b a"),
]


def _draw_predictions(count: int, seed: int, share: float = 0.6) -> tuple[list[str], list[str], list[str]]:
    """Draw imbalanced labels, and two classifiers that agree on about half of their errors."""
    generator = random.Random(seed)
    expected = generator.choices("abcdef", weights=[40, 25, 15, 10, 6, 4], k=count)
    ours, theirs = [], []
    for label in expected:
        guesses = generator.choices("abcdef", k=2)
        first, second = generator.random() < share, generator.random() < share
        ours.append(label if first else guesses[0])
        theirs.append(ours[-1] if generator.random() < 0.5 else label if second else guesses[1])
    return expected, ours, theirs


@pytest.mark.parametrize("count", [102, 300])
def test_the_bounds_of_macro_f1_are_those_of_a_paired_bootstrap_of_the_predictions(count: int) -> None:
    expected, ours, theirs = map(np.array, _draw_predictions(count, count))
    differences = np.array(score_macro_f1(theirs, expected)[1]) - np.array(score_macro_f1(ours, expected)[1])
    bounds = compute_file_bounds(differences, np.ones(count), 1.0)
    generator = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = generator.integers(0, count, count)
        drawn.append(score_macro_f1(expected[rows], theirs[rows])[0] - score_macro_f1(expected[rows], ours[rows])[0])
    low, high = bounds.mean - 1.645 * np.std(drawn), bounds.mean + 1.645 * np.std(drawn)
    assert (bounds.low, bounds.high) == pytest.approx((low, high), abs=0.15 * (high - bounds.mean))
