"""Tasks of lm-evaluation-harness, given as local files (extra `lm-eval`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from rightrank.engine.gradient_checkpointing import kv_cache
from rightrank.engine.runtime import Runtime
from rightrank.errors import MetricError, MissingExtraError, SettingsError
from rightrank.io.scorers import Scored
from rightrank.settings import MetricSpec

MEAN_TOLERANCE = 1e-9  # relative, between a metric and the mean of its examples' scores


def require_task(spec: MetricSpec) -> None:
    """Check that a task can be run.

    Raises:
        SettingsError: there is no such file, or no task in it.
        MissingExtraError: lm-eval is not installed.
    """
    path = Path(spec.target)
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        raise SettingsError(f"metric {spec.name!r}: {spec.target!r} is no task file; give lm-eval:TASK.yaml[:METRIC]")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            f"metric {spec.name!r}: tasks of lm-evaluation-harness need an extra: pip install 'rightrank[lm-eval]'"
        ) from None
    _task_name(spec)


def score_task(runtime: Runtime, spec: MetricSpec) -> Scored:
    """The task's metric under the adapter that the base now carries, with one score per example if it is their mean.

    Raises:
        MetricError: the task can't be run, or does not have the metric.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    name = _task_name(spec)
    with runtime.without_dropout(), kv_cache(runtime.model), redirect_stdout(sys.stderr):
        try:
            found = lm_eval.simple_evaluate(
                model=HFLM(
                    pretrained=runtime.model,
                    tokenizer=runtime.loaded.tokenizer,
                    batch_size=runtime.settings.eval_batch_size,
                ),
                tasks=[name],
                task_manager=TaskManager(include_path=str(Path(spec.target).parent), include_defaults=False),
                bootstrap_iters=0,
                verbosity="ERROR",
            )
        except Exception as error:  # a task file runs whatever it names
            reason = " ".join(str(error).split())[:300]
            raise MetricError(f"metric {spec.name!r}: task {name!r} raised {type(error).__name__}: {reason}") from error
    return _scored(spec, found["results"][name], found["samples"][name])


def _task_name(spec: MetricSpec) -> str:
    """The task's name in the file, read without running the functions that the file may name."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    try:
        content = yaml.load(Path(spec.target).read_text(encoding="utf-8"), Loader)  # a safe loader
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"metric {spec.name!r}: {spec.target}: {' '.join(str(error).split())}") from None
    name = content.get("task") if isinstance(content, Mapping) else None
    if not isinstance(name, str):
        raise SettingsError(f"metric {spec.name!r}: {spec.target} names no single task (`task: NAME`)")
    return name


def _scored(spec: MetricSpec, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Scored:
    """The requested metric, or the task's first. Names match without the filter (`acc,none` is `acc`)."""
    numbers = {key: value for key, value in result.items() if "," in key and "_stderr" not in key}
    keys = [key for key in numbers if spec.key in (None, key, key.split(",")[0])]
    if not keys or not isinstance(numbers[keys[0]], int | float):
        there = ", ".join(dict.fromkeys(key.split(",")[0] for key in numbers)) or "none"
        raise MetricError(f"metric {spec.name!r}: the task has no number {spec.key!r}; it has: {there}")
    metric, _, chosen = keys[0].partition(",")
    value = float(numbers[keys[0]])
    mine = sorted((s for s in samples if s.get("filter", chosen) == chosen), key=lambda sample: sample["doc_id"])
    found = [sample.get(metric) for sample in mine]
    scores = [float(score) for score in found if isinstance(score, int | float)]
    if not scores or len(scores) < len(found):
        return Scored(value, None)
    is_mean = abs(sum(scores) / len(scores) - value) <= MEAN_TOLERANCE * max(1.0, abs(value))
    return Scored(value, scores if is_mean else None)
