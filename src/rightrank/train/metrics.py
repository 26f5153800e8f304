"""The metrics that a training ends with: scores of the model's answers, tasks of lm-eval, and metrics of the user's own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rightrank.schema.errors import MetricError, MissingExtraError, SettingsError
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.train.device import kv_cache
from rightrank.train.distributed import broadcast, process_index
from rightrank.train.generation import answers
from rightrank.train.runtime import Runtime
from rightrank.train.scorers import ModelAnswer, Scored, ScorerLimits, require_scorer, score, write_answers
from rightrank.train.scores import exact_match, macro_f1, macro_f1_shares, rouge_l, rouge_n, token_f1

METRIC_TIMEOUT_SECONDS = 600.0  # of a function or program that computes a metric
MEAN_TOLERANCE = 1e-9  # relative, between a metric and the mean of its examples' scores

TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # of the expected and the generated text
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": partial(rouge_n, n=1),
    "rouge2": partial(rouge_n, n=2),
    "rougeL": rouge_l,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics by name, and the reasons why some failed."""

    scored: dict[str, Scored] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {name: scored.value for name, scored in self.scored.items()}

    @property
    def items(self) -> dict[str, list[float]]:
        return {name: scored.examples for name, scored in self.scored.items() if scored.examples is not None}

    def require(self, names: Sequence[str]) -> None:
        """Check that these metrics have a value.

        Raises:
            MetricError: one of them failed.
        """
        reason = next((self.failed[name] for name in names if name in self.failed), None)
        if reason is not None:
            raise MetricError(f"{reason}; trained adapters are kept: fix the cause and run the same command again")


def end_metrics(settings: SelectSettings) -> list[MetricSpec]:
    """The metrics of the settings that are measured when a training ends."""
    return [spec for spec in settings.metric_specs if not spec.is_measured_along]


def limits_of(settings: SelectSettings) -> ScorerLimits:
    return ScorerLimits(METRIC_TIMEOUT_SECONDS, settings.trust_remote_code)


def require_scorers(settings: SelectSettings) -> None:
    """Check before anything is loaded that every metric can be measured.

    Raises:
        SettingsError: a metric can't be measured.
        MissingExtraError: a metric needs an extra that is not installed.
    """
    for spec in settings.metric_specs:
        require_scorer(spec, limits_of(settings))
        if spec.kind == "lm-eval":
            require_task(spec)


def measure(runtime: Runtime, split: SplitName, keep: Path | None = None) -> Measured:
    """Every end metric on a split, under the adapter that the base now carries.

    Args:
        split: the examples to answer. Tasks bring their own examples, so they are measured for `selection` only.
        keep: a file for the answers.
    """
    specs = end_metrics(runtime.settings)
    measured = Measured()
    if not specs:
        return measured
    answered = answers(runtime, split) if any(spec.needs_answers for spec in specs) else []
    if keep is not None and answered and process_index() == 0:
        write_answers(answered, keep)
    for spec in specs:
        if spec.kind == "lm-eval" and split != "selection":
            continue
        try:
            measured.scored[spec.name] = _in_every_process(partial(_score, runtime, spec, answered))
        except MetricError as error:
            measured.failed[spec.name] = str(error)
    return measured


def _score(runtime: Runtime, spec: MetricSpec, answered: Sequence[ModelAnswer]) -> Scored:
    if spec.kind == "lm-eval":
        return score_task(runtime, spec)
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        return Scored.of_examples([text_score(answer.expected, answer.completion) for answer in answered])
    if spec.name == "macro_f1":
        sides = [a.expected for a in answered], [a.completion for a in answered]
        return Scored(macro_f1(*sides), macro_f1_shares(*sides))
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        path = Path(folder) / "answers.jsonl"
        write_answers(answered, path)
        return score(spec, path, len(answered), limits_of(runtime.settings))


def _in_every_process(task: Callable[[], Scored]) -> Scored:
    """Run `task` in process 0 and return its result in every process."""
    result: dict[str, object] = {}
    if process_index() == 0:
        try:
            scored = task()
            result = {"value": scored.value, "items": scored.examples}
        except MetricError as error:
            result = {"error": str(error)}
    result = broadcast(0, result)
    if "error" in result:
        raise MetricError(str(result["error"]))
    return Scored(result["value"], result["items"])  # type: ignore[arg-type]


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
