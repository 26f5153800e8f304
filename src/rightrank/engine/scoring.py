"""End metrics: those of the model's answers and of tasks, measured when a training ends."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rightrank.engine.distributed import broadcast, process_index
from rightrank.engine.generation import answers as answers_of
from rightrank.engine.runtime import Runtime
from rightrank.engine.tasks import require_task, score_task
from rightrank.errors import MetricError
from rightrank.io.scorers import ModelAnswer, Scored, ScorerLimits, require_scorer, score, write_answers
from rightrank.maths.scores import exact_match, macro_f1, rouge_l, rouge_n, token_f1
from rightrank.records import SplitName
from rightrank.settings import MetricSpec, SelectSettings

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
    return ScorerLimits(settings.metric_timeout_seconds, settings.trust_remote_code)


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
    answered = answers_of(runtime, split) if any(spec.needs_answers for spec in specs) else []
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
        return Scored(macro_f1([a.expected for a in answered], [a.completion for a in answered]), None)
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
