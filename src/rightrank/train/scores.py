"""Scores of a generated answer against the expected one, from 0 (worst) to 1 (best), and F1 over classes."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalised(text: str) -> str:
    """Lower case without punctuation, English articles and extra space, as in the evaluation script of SQuAD."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(expected: str, written: str) -> float:
    """1 if both are equal after normalisation."""
    return float(_normalised(expected) == _normalised(written))


def token_f1(expected: str, written: str) -> float:
    """The harmonic mean of precision and recall over normalised words, each counted as often as it occurs."""
    ours, theirs = _normalised(written).split(), _normalised(expected).split()
    if not ours or not theirs:
        return float(ours == theirs)
    return _f1(sum((Counter(ours) & Counter(theirs)).values()), len(ours), len(theirs))


def rouge_l(expected: str, written: str) -> float:
    """The F1 of ROUGE-L (Lin 2004): the longest common subsequence of lower-case words of letters and digits, not stemmed."""
    ours, theirs = _words(written), _words(expected)
    if not ours or not theirs:
        return 0.0
    return _f1(_common_length(ours, theirs), len(ours), len(theirs))


def rouge_n(expected: str, written: str, n: int) -> float:
    """The F1 of ROUGE-N (Lin 2004): n-grams, each counted as often as it occurs, of words as in `rouge_l`."""
    ours, theirs = _ngrams(_words(written), n), _ngrams(_words(expected), n)
    whole = ours.total() + theirs.total()
    return 2 * (ours & theirs).total() / whole if ours and theirs else 0.0


def macro_f1(expected: Sequence[str], predicted: Sequence[str]) -> tuple[float, list[float]]:
    """The mean F1 over the classes that occur on either side, as `average="macro"` in scikit-learn, and each example's share.

    The metric is no mean over examples. The shares, whose mean it is, are pseudo-values of the jackknife (Tukey 1958) about
    the metric itself. Their paired differences have the standard error that a paired bootstrap of the examples has, with
    which a test compares them, so that the metric gets bounds as any other. The examples of one cell of the confusion matrix
    have the same share, so that few matrices are scored.
    """
    pairs = Counter(zip(expected, predicted, strict=True))
    whole, count = _macro_f1(pairs), pairs.total()
    if count < 2:
        return whole, [whole]
    by_pair = {pair: _macro_f1(pairs - Counter([pair])) for pair in pairs}
    without = [by_pair[pair] for pair in zip(expected, predicted, strict=True)]
    mean = sum(without) / count
    return whole, [whole + (count - 1) * (mean - value) for value in without]


def _macro_f1(pairs: Counter[tuple[str, str]]) -> float:
    """Of the counts of (expected, predicted)."""
    theirs: Counter[str] = Counter()
    ours: Counter[str] = Counter()
    for (expected, predicted), count in pairs.items():
        theirs[expected] += count
        ours[predicted] += count
    classes = sorted({*theirs, *ours})
    return sum(_f1(pairs[name, name], ours[name], theirs[name]) for name in classes) / len(classes)


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _f1(common: int, ours: int, theirs: int) -> float:
    return 2 * common / (ours + theirs)


def _common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, by dynamic programming one row at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for column, other in enumerate(second, start=1):
            row.append(above[column - 1] + 1 if word == other else max(above[column], row[-1]))
    return row[-1]
