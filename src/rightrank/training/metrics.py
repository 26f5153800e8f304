"""The metrics that are measured when a training ends: built-in scores of the model's answers, and user functions, which are imported and
called in this process.

Built-in metrics compare a generated answer with the expected one, from 0 (worst) to 1 (best). Macro F1 is also defined over classes.
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

from rightrank.data.files import replace_file
from rightrank.schema.errors import MetricError, SettingsError, log_traceback
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.training.evaluation import MetricResults
from rightrank.training.generation import ModelAnswer, generate_answers
from rightrank.training.runtime import Runtime

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _normalise(text: str) -> str:
    """Return the text in lower case without punctuation, English articles and extra spaces, as in SQuAD's evaluation script."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def score_exact_match(expected: str, completion: str) -> float:
    """Return 1 if both texts are equal after normalisation, and 0 otherwise."""
    return float(_normalise(expected) == _normalise(completion))


def score_token_f1(expected: str, completion: str) -> float:
    """Return the harmonic mean of precision and recall over normalised words, each counted as often as it occurs."""
    completion_words, expected_words = _normalise(completion).split(), _normalise(expected).split()
    if not completion_words or not expected_words:
        return float(completion_words == expected_words)
    return _compute_f1(
        sum((Counter(completion_words) & Counter(expected_words)).values()), len(completion_words), len(expected_words)
    )


def score_rouge_l(expected: str, completion: str) -> float:
    """Return the F1 of ROUGE-L (Lin 2004): the longest common subsequence of words of lower-case letters and digits, without stemming."""
    completion_words, expected_words = _split_words(completion), _split_words(expected)
    if not completion_words or not expected_words:
        return 0.0
    return _compute_f1(
        _compute_common_length(completion_words, expected_words), len(completion_words), len(expected_words)
    )


def score_rouge_n(expected: str, completion: str, n: int) -> float:
    """Return the F1 of ROUGE-N (Lin 2004) over n-grams of words as in `score_rouge_l`, each counted as often as it occurs."""
    completion_ngrams, expected_ngrams = (
        _count_ngrams(_split_words(completion), n),
        _count_ngrams(_split_words(expected), n),
    )
    num_ngrams = completion_ngrams.total() + expected_ngrams.total()
    return (
        2 * (completion_ngrams & expected_ngrams).total() / num_ngrams if completion_ngrams and expected_ngrams else 0.0
    )


def score_macro_f1(expected: Sequence[str], predicted: Sequence[str]) -> tuple[float, list[float]]:
    """Return the mean F1 over all expected and predicted classes, as `average="macro"` in scikit-learn, and a score per example.

    Macro F1 is not a mean over examples. The example scores are jackknife pseudo-values (Tukey 1958) around the metric, so that the
    metric is their mean. A test compares the standard error of their paired differences with that of a paired bootstrap of the
    examples, so the metric gets bounds like any other. Examples in the same cell of the confusion matrix have the same score, so
    that only a few matrices have to be scored.
    """
    pairs = Counter(zip(expected, predicted, strict=True))
    value, count = _compute_macro_f1(pairs), pairs.total()
    if count < 2:
        return value, [value]
    by_pair = {pair: _compute_macro_f1(pairs - Counter([pair])) for pair in pairs}
    leave_one_out = [by_pair[pair] for pair in zip(expected, predicted, strict=True)]
    mean = sum(leave_one_out) / count
    return value, [value + (count - 1) * (mean - score) for score in leave_one_out]


def _compute_macro_f1(pairs: Counter[tuple[str, str]]) -> float:
    """Compute macro F1 from the counts of (expected, predicted) pairs."""
    expected_counts: Counter[str] = Counter()
    predicted_counts: Counter[str] = Counter()
    for (expected, predicted), count in pairs.items():
        expected_counts[expected] += count
        predicted_counts[predicted] += count
    classes = sorted({*expected_counts, *predicted_counts})
    return sum(_compute_f1(pairs[name, name], predicted_counts[name], expected_counts[name]) for name in classes) / len(
        classes
    )


def _count_ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


def _split_words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def _compute_f1(num_common: int, num_predicted: int, num_expected: int) -> float:
    return 2 * num_common / (num_predicted + num_expected)


def _compute_common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by dynamic programming one row at a time."""
    row = [0] * (len(second) + 1)
    for word in first:
        previous_row = row
        row = [0]
        for column, second_word in enumerate(second, start=1):
            row.append(previous_row[column - 1] + 1 if word == second_word else max(previous_row[column], row[-1]))
    return row[-1]


TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # functions of the expected and the generated text
    "exact_match": score_exact_match,
    "f1": score_token_f1,
    "rouge1": partial(score_rouge_n, n=1),
    "rouge2": partial(score_rouge_n, n=2),
    "rougeL": score_rouge_l,
}


def measure_metrics(runtime: Runtime, split: SplitName, answers_file: Path | None = None) -> MetricResults:
    """Measure every metric that is due at the end of a training, on a split, with the current adapter.

    Args:
        split: the examples to answer.
        answers_file: a file for the answers, one JSON object per line: example_id, prompt, completion, expected.
    """
    specs = [spec for spec in runtime.settings.metric_specs if not spec.is_eval_metric]
    results = MetricResults()
    if not specs:
        return results
    answers = generate_answers(runtime, split)
    if answers_file is not None and answers:
        with replace_file(answers_file) as temporary:
            lines = (json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
            temporary.write_text("".join(lines), encoding="utf-8")
    for spec in specs:
        try:
            metric_score = score_answers(spec, answers)
        except MetricError as error:
            results.failures[spec.name] = str(error)
            continue
        results.values[spec.name] = metric_score.value
        if metric_score.examples is not None:
            results.example_scores[spec.name] = metric_score.examples
    return results


@dataclass(frozen=True, slots=True)
class MetricScore:
    """A metric's value, and example scores of which it is the mean (for macro F1, pseudo-values)."""

    value: float
    examples: list[float] | None


def score_answers(spec: MetricSpec, answers: Sequence[ModelAnswer]) -> MetricScore:
    """Score the answers with a built-in metric or a user function.

    Raises:
        MetricError: the function failed, or returned something other than scores.
    """
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        values = [text_score(answer.expected, answer.completion) for answer in answers]
        return MetricScore(sum(values) / len(values), values)
    if spec.name == "macro_f1":
        return MetricScore(*score_macro_f1([a.expected for a in answers], [a.completion for a in answers]))
    returned = _call_function(spec, answers)
    is_single_value = not isinstance(returned, list | tuple)
    scores = [returned] if is_single_value else list(returned)
    if not is_single_value and len(scores) != len(answers):
        raise MetricError(
            f"metric {spec.name!r}: the function returned {len(scores)} scores for {len(answers)} examples; return one score per example"
        )
    for value in scores:
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise MetricError(
                f"metric {spec.name!r}: the function returned {_shorten(repr(value))}; return finite numbers"
            )
    values = [float(value) for value in scores]
    return MetricScore(values[0], None) if is_single_value else MetricScore(sum(values) / len(values), values)


def require_metric_functions(settings: SelectSettings) -> None:
    """Raise if the function of a metric does not exist. It is called before any model is loaded.

    Raises:
        SettingsError: a function does not exist.
    """
    for spec in settings.metric_specs:
        if spec.kind == "function":
            _load_function(spec)


def _call_function(spec: MetricSpec, answers: Sequence[ModelAnswer]) -> Any:
    """Call the user function and return its result, with numbers of numpy or torch converted to Python numbers."""
    function = _load_function(spec)
    arguments = {
        "prompts": [answer.prompt for answer in answers],
        "completions": [answer.completion for answer in answers],
        "expected": [answer.expected for answer in answers],
    }
    parameters = inspect.signature(function).parameters.values()
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
    names = {parameter.name for parameter in parameters}
    try:
        with redirect_stdout(sys.stderr):
            returned = function(**{name: value for name, value in arguments.items() if accepts_any or name in names})
    except Exception as error:
        log_traceback(error)
        raise MetricError(
            f"metric {spec.name!r}: {spec.target} raised {type(error).__name__}: {_shorten(str(error))}"
        ) from error
    return returned.tolist() if hasattr(returned, "tolist") else returned


def _load_function(spec: MetricSpec) -> Callable[..., Any]:
    """Load the function `module:name` or `file.py:name`. Modules are also searched in the current folder.

    Raises:
        SettingsError: the module, the file or the function does not exist.
    """
    location, _, name = spec.target.rpartition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = _import_file(location) if location.endswith(".py") else importlib.import_module(location)
    except Exception as error:  # user code may raise anything on import
        log_traceback(error)
        raise SettingsError(
            f"metric {spec.name!r}: can't import {location!r} ({type(error).__name__}: {_shorten(str(error))})"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        function_names = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise SettingsError(
            f"metric {spec.name!r}: {location!r} has no function {name!r}; its functions are: {', '.join(function_names) or 'none'}"
        )
    typed: Callable[..., Any] = function
    return typed


def _import_file(path: str) -> Any:
    spec = spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 160 else f"{line[:157]}…"
