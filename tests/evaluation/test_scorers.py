"""Test user functions that score: their arguments, the values that they may return, and how invalid values are reported."""

from __future__ import annotations

from pathlib import Path

import pytest

from rightrank.evaluation.answers import ModelAnswer, score_answers
from rightrank.schema.metrics import parse_metrics

pytestmark = pytest.mark.trains

NASTY = ["$(touch owned)", "`touch owned`", "; touch owned", "a\nb\u2028c", "'\"\\", "", "{file}", "-n"]
ANSWERS = [ModelAnswer(str(n), text, text, "expected") for n, text in enumerate(NASTY)]


@pytest.fixture(autouse=True)
def work_in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


FUNCTIONS = """
def by_item(completions, expected):
    print("noise on stdout")
    return [float(len(text)) for text in completions]

def whole(prompts, completions, expected, **others):
    return sum(len(text) for text in completions)

def wrong_count(completions):
    return [1.0]

def raises(completions):
    raise ValueError("not\\ntoday")

def nothing(completions):
    return None

def greedy(completions, temperature):
    return 1.0

A_NUMBER = 3
"""


def test_python_functions(capsys: pytest.CaptureFixture[str]) -> None:
    Path("scores_of_mine.py").write_text(FUNCTIONS)
    lengths = [float(len(text)) for text in NASTY]
    assert score_answers(*parse_metrics("scores_of_mine:by_item"), ANSWERS) == (sum(lengths) / 8, lengths)
    assert score_answers(*parse_metrics("scores_of_mine.py:whole"), ANSWERS) == (sum(lengths), None)
    assert capsys.readouterr().out == ""
