"""Runs a Python function or a metric of `evaluate` in its own process: `python -m rightrank.train.score_worker TASK`.

TASK is a JSON object with kind, target, key, answers (a JSONL file; null to check only that the target exists) and
out. The result is written to the file `out`: `{"scores": …}` or `{"error": …}`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

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
    """The metric on all examples; as a list with one score per example if the metric is their mean."""
    try:
        import evaluate
    except ImportError:
        raise ScorerError(NO_EXTRA) from None
    metric = evaluate.load(target)
    if answers is None:
        return None
    predictions = _converted(metric, "predictions", [answer["completion"] for answer in answers], answers)
    references = _converted(metric, "references", [answer["expected"] for answer in answers], answers)
    whole = _one(metric.compute(predictions=predictions, references=references), key)
    try:
        alone = [
            _one(metric.compute(predictions=[ours], references=[theirs]), key)
            for ours, theirs in zip(predictions, references, strict=True)
        ]
    except Exception:  # noqa: BLE001 - third-party code that may not support a single example
        return whole
    is_mean = abs(sum(alone) / len(alone) - whole) <= MEAN_TOLERANCE * max(1.0, abs(whole))
    return alone if is_mean else whole


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
