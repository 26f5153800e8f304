"""Scores of a written answer against the expected one: 0 worst, 1 best, one an item; and F1 over classes."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Lower case without punctuation, English articles and extra space, as SQuAD's own script has it."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(expected: str, written: str) -> float:
    """1 where both are the same once normalised."""
    return float(normalised(expected) == normalised(written))


def token_f1(expected: str, written: str) -> float:
    """The harmonic mean of precision and recall over normalised words, each counted as often as it occurs."""
    ours, theirs = normalised(written).split(), normalised(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_l(expected: str, written: str) -> float:
    """ROUGE-L's F1 (Lin 2004): the longest common subsequence of lower-case words of letters and digits, no stemming."""
    ours, theirs = _words(written), _words(expected)
    if not ours or not theirs:
        return 0.0
    return _f1(_common_length(ours, theirs), len(ours), len(theirs))


def rouge_n(expected: str, written: str, n: int) -> float:
    """ROUGE-N's F1 (Lin 2004): runs of n words, each counted as often as it occurs; words as in `rouge_l`."""
    ours, theirs = _runs(_words(written), n), _runs(_words(expected), n)
    whole = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / whole if ours and theirs else 0.0


def macro_f1(expected: Sequence[str], predicted: Sequence[str]) -> float:
    """The mean over the classes that occur on either side of each one's F1: scikit-learn's `average="macro"`."""
    classes = sorted({*expected, *predicted})
    pairs = Counter(zip(expected, predicted, strict=True))
    counts = [(pairs[name, name], predicted.count(name), expected.count(name)) for name in classes]
    return sum(_f1(common, ours, theirs) for common, ours, theirs in counts) / len(classes)


def _runs(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, a row of the table at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for column, other in enumerate(second, start=1):
            row.append(above[column - 1] + 1 if word == other else max(above[column], row[-1]))
    return row[-1]
