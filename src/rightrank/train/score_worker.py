"""Runs a Python function or a metric of `evaluate` in its own process: `python -m rightrank.train.score_worker TASK`.

TASK is a JSON object with kind, target, key, answers (a JSONL file; null to check only that the target exists) and
out. The result is written to the file `out`: `{"scores": …}` or `{"error": …}`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MIN_GROUPS, MAX_GROUPS = 10, 50  # of the jackknife
NO_EXTRA = "it needs an extra: pip install 'rightrank[evaluate]'"
MEAN_TOLERANCE = 1e-9  # relative, between a metric of all examples and the mean over single ones


class ScorerError(Exception):
    """Scoring failed; the message states why."""


def main(task: Mapping[str, Any]) -> None:
    try:
        result: dict[str, object] = {"scores": scores(task)}
    except ScorerError as error:
        result = {"error": str(error)}
    except Exception as error:  # noqa: BLE001 - user code: its error is the result
        result = {"error": f"{task['target']} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    Path(task["out"]).write_text(json.dumps(result), encoding="utf-8")


def scores(task: Mapping[str, Any]) -> object:
    """A number, a list with one number per example, or None without answers.

    Raises:
        ScorerError: no such function or metric, or it returned no number.
    """
    answers = None
    if task["answers"] is not None:
        lines = Path(task["answers"]).read_text(encoding="utf-8").split("\n")
        answers = [json.loads(line) for line in lines if line]
    if task["kind"] == "evaluate":
        return _evaluate(task["target"], task["key"], answers)
    function = _find_function(task["target"])
    if answers is None:
        return None
    given = {
        "prompts": [answer["prompt"] for answer in answers],
        "completions": [answer["completion"] for answer in answers],
        "expected": [answer["expected"] for answer in answers],
    }
    return plain(function(**_accepted(function, given)))


def _find_function(target: str) -> Callable[..., object]:
    """Import the function `module:name` or `file.py:name`.

    Raises:
        ScorerError: no such module, file or function.
    """
    where, _, name = target.rpartition(":")
    sys.path.insert(0, str(Path.cwd()))
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None or not Path(where).is_file():
            raise ScorerError(f"no file {where!r}; give FILE.py:FUNCTION")
        sys.path.insert(0, str(Path(where).resolve().parent))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ScorerError(f"no module {error.name!r}; give MODULE:FUNCTION, or FILE.py:FUNCTION") from None
    function: Callable[..., object] | None = getattr(module, name, None)
    if function is None or not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value) and key[0] != "_"]
        raise ScorerError(f"{where!r} has no function {name!r}; it has: {', '.join(there) or 'none'}")
    return function


def _accepted(function: Callable[..., object], given: dict[str, list[str]]) -> dict[str, list[str]]:
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return given
    names = {parameter.name for parameter in parameters}
    missing = [p.name for p in parameters if p.name not in given and p.default is inspect.Parameter.empty]
    if missing:
        raise ScorerError(f"the function requires {', '.join(missing)}; it can take {', '.join(given)}")
    return {name: value for name, value in given.items() if name in names}


def plain(value: Any) -> object:
    """Convert numbers of numpy, torch or Python to JSON values."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, bool | int | float):
        return float(value)
    raise ScorerError(
        f"it returned {type(value).__name__} {str(value)[:60]!r}; return a number, or a list with one per example"
    )


def _evaluate(target: str, key: str | None, answers: list[dict[str, str]] | None) -> object:
    """The metric as a list of its examples' scores, or of their shares where it is no mean; one number where neither exists."""
    try:
        import evaluate
    except ImportError:
        raise ScorerError(NO_EXTRA) from None
    metric = evaluate.load(target)
    if answers is None:
        return None
    predictions = _converted(metric, "predictions", [answer["completion"] for answer in answers], answers)
    references = _converted(metric, "references", [answer["expected"] for answer in answers], answers)

    def compute(kept: Sequence[int]) -> float:
        found = metric.compute(predictions=[predictions[i] for i in kept], references=[references[i] for i in kept])
        return _one(found, key)

    every = range(len(answers))
    whole = compute(every)
    try:
        alone = [compute([place]) for place in every]
        if abs(sum(alone) / len(alone) - whole) <= MEAN_TOLERANCE * max(1.0, abs(whole)):
            return alone
    except Exception:  # noqa: BLE001 - third-party code that may not support a single example
        pass
    try:
        return _shares(whole, len(answers), compute)
    except Exception:  # noqa: BLE001 - third-party code that may not support a part of the examples
        return whole


def _shares(whole: float, count: int, compute: Callable[[Sequence[int]], float]) -> object:
    """The examples' shares by a jackknife that leaves out a group at a time; with few examples, one at a time."""
    groups = min(count, MAX_GROUPS)
    if groups < MIN_GROUPS:
        return whole
    without = [compute([place for place in range(count) if place % groups != group]) for group in range(groups)]
    mean = sum(without) / groups
    spread = (groups - 1) * math.sqrt(count / groups)  # the mean over examples then varies as the metric does
    found = [spread * (mean - without[place % groups]) for place in range(count)]
    centre = sum(found) / count
    return [whole + one - centre for one in found]


def _converted(metric: Any, side: str, texts: list[str], answers: list[dict[str, str]]) -> list[Any]:
    """Texts in the type of the metric's column: unchanged, as floats, or as class indices for integers."""
    features = metric.features[0] if isinstance(metric.features, list) else metric.features
    kind = str(getattr(features[side], "dtype", "string"))
    if kind.startswith("float"):
        return [float(text) for text in texts]
    if kind.startswith(("int", "uint")):
        names = sorted({text for answer in answers for text in (answer["completion"], answer["expected"])})
        return [names.index(text) for text in texts]
    return texts


def _one(result: Any, key: str | None) -> float:
    numbers = {name: value for name, value in dict(result or {}).items() if hasattr(value, "__float__")}
    if key is None and len(numbers) == 1:
        key = next(iter(numbers))
    if key not in numbers:
        raise ScorerError(f"no number {key!r} in it; it gives {', '.join(numbers) or 'none'}: evaluate:NAME:KEY")
    return float(numbers[key])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
