"""Scores of text: worked by hand, and what must hold for any text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rightrank.maths.scores import exact_match, rouge_l, token_f1


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
