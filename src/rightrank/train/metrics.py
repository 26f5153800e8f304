"""The metrics that a training ends with: scores of the model's answers, by ours and by a function of the user's own, which is imported and
called in this process.

Ours score a generated answer against the expected one, from 0 (worst) to 1 (best); F1 is over classes too.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import string
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from rightrank.data.files import replacing
from rightrank.schema.errors import MetricError, SettingsError
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.train.evaluation import Measured
from rightrank.train.generation import ModelAnswer, answers
from rightrank.train.runtime import Runtime

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


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # of the expected and the generated text
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": partial(rouge_n, n=1),
    "rouge2": partial(rouge_n, n=2),
    "rougeL": rouge_l,
}


def measure(runtime: Runtime, split: SplitName, keep: Path | None = None) -> Measured:
    """Every metric that is measured when a training ends, on a split, under the adapter that the base now carries.

    Args:
        split: the examples to answer.
        keep: a file for the answers, one JSON object a line: item_id, prompt, completion, expected.
    """
    specs = [spec for spec in runtime.settings.metric_specs if not spec.is_measured_along]
    measured = Measured()
    if not specs:
        return measured
    answered = answers(runtime, split)
    if keep is not None and answered:
        with replacing(keep) as temporary:
            lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answered)
            temporary.write_text("".join(lines), encoding="utf-8")
    for spec in specs:
        try:
            scored = score(spec, answered)
        except MetricError as error:
            measured.failed[spec.name] = str(error)
            continue
        measured.values[spec.name] = scored.value
        if scored.examples is not None:
            measured.items[spec.name] = scored.examples
    return measured


@dataclass(frozen=True, slots=True)
class Scored:
    """A metric's value, and scores of the examples whose mean it is: their own, or their shares (`macro_f1`)."""

    value: float
    examples: list[float] | None


def score(spec: MetricSpec, answered: Sequence[ModelAnswer]) -> Scored:
    """Score the answers by a metric of ours, or by a function.

    Raises:
        MetricError: the function failed, or returned something other than scores.
    """
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        values = [text_score(answer.expected, answer.completion) for answer in answered]
        return Scored(sum(values) / len(values), values)
    if spec.name == "macro_f1":
        return Scored(*macro_f1([a.expected for a in answered], [a.completion for a in answered]))
    given = _returned(spec, answered)
    is_one = not isinstance(given, list | tuple)
    scores = [given] if is_one else list(given)
    if not is_one and len(scores) != len(answered):
        raise MetricError(
            f"metric {spec.name!r}: it gave {len(scores)} scores for {len(answered)} examples; one per example is expected"
        )
    for value in scores:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise MetricError(f"metric {spec.name!r}: it gave {_short(repr(value))}; finite numbers are expected")
    values = [float(value) for value in scores]
    return Scored(values[0], None) if is_one else Scored(sum(values) / len(values), values)


def require_scorers(settings: SelectSettings) -> None:
    """Check before anything is loaded that the function of every metric exists.

    Raises:
        SettingsError: one does not exist.
    """
    for spec in settings.metric_specs:
        if spec.kind == "function":
            _function(spec)


def _returned(spec: MetricSpec, answered: Sequence[ModelAnswer]) -> Any:
    """What the function returns, numbers of numpy or torch as Python's."""
    function = _function(spec)
    given = {
        "prompts": [answer.prompt for answer in answered],
        "completions": [answer.completion for answer in answered],
        "expected": [answer.expected for answer in answered],
    }
    parameters = inspect.signature(function).parameters.values()
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    try:
        with redirect_stdout(sys.stderr):
            returned = function(**{name: value for name, value in given.items() if takes_all or name in names})
    except Exception as error:
        raise MetricError(
            f"metric {spec.name!r}: {spec.target} raised {type(error).__name__}: {_short(str(error))}"
        ) from error
    return returned.tolist() if hasattr(returned, "tolist") else returned


def _function(spec: MetricSpec) -> Callable[..., Any]:
    """The function `module:name` or `file.py:name`; modules are found from the working folder.

    Raises:
        SettingsError: no such module, file or function.
    """
    where, _, name = spec.target.rpartition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = _module_of_file(where) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # noqa: BLE001 - user code: whatever its import raises
        raise SettingsError(
            f"metric {spec.name!r}: can't import {where!r} ({type(error).__name__}: {_short(str(error))})"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise SettingsError(
            f"metric {spec.name!r}: {where!r} has no function {name!r}; it has: {', '.join(there) or 'none'}"
        )
    typed: Callable[..., Any] = function
    return typed


def _module_of_file(path: str) -> Any:
    spec = spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}…"
