"""Every metric that is not measured along a training: of what the model answers, and of tasks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rightrank.engine.distributed import broadcast, process_index
from rightrank.engine.generation import answers as answers_of
from rightrank.engine.runtime import Runtime
from rightrank.engine.tasks import score_task
from rightrank.errors import MetricError
from rightrank.io.scorers import ModelAnswer, Scored, ScorerLimits, require_scorer, score, write_answers
from rightrank.maths.scores import exact_match, macro_f1, rouge_l, rouge_n, token_f1
from rightrank.records import SplitName
from rightrank.settings import MetricSpec, SelectSettings

TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # of the expected and the written text
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": partial(rouge_n, n=1),
    "rouge2": partial(rouge_n, n=2),
    "rougeL": rouge_l,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics by name, and why there is none of some."""

    scored: dict[str, Scored] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        return {name: scored.value for name, scored in self.scored.items()}

    @property
    def items(self) -> dict[str, list[float]]:
        return {name: scored.items for name, scored in self.scored.items() if scored.items is not None}

    def require(self, names: Sequence[str]) -> None:
        """
        Raises:
            MetricError: one of these failed.
        """
        reason = next((self.failed[name] for name in names if name in self.failed), None)
        if reason is not None:
            raise MetricError(f"{reason}; what was trained is kept: mend it and run the same command again")


def end_metrics(settings: SelectSettings) -> list[MetricSpec]:
    """The metrics that are measured where a training ends."""
    return [spec for spec in settings.metric_specs if not spec.is_measured_along]


def limits_of(settings: SelectSettings) -> ScorerLimits:
    return ScorerLimits(settings.metric_timeout_seconds, settings.trust_remote_code)


def require_scorers(settings: SelectSettings) -> None:
    """Find out before anything is loaded whether every metric can be had.

    Raises:
        SettingsError: one can't.
        MissingExtraError: one needs what is not installed.
    """
    from rightrank.engine.tasks import require_task

    for spec in settings.metric_specs:
        require_scorer(spec, limits_of(settings))
        if spec.kind == "lm-eval":
            require_task(spec)


def measure(runtime: Runtime, split: SplitName, keep: Path | None = None) -> Measured:
    """Every such metric on a split, under whatever adapter the base now carries.

    Args:
        runtime: base, data and settings.
        split: the items asked; tasks bring their own, the same for every split, and are measured on `selection` alone.
        keep: the file to keep the answers in.
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
        item_score = TEXT_SCORES[spec.name]
        return Scored.of_items([item_score(answer.expected, answer.completion) for answer in answered])
    if spec.name == "macro_f1":
        return Scored(macro_f1([a.expected for a in answered], [a.completion for a in answered]), None)
    with tempfile.TemporaryDirectory(prefix="rightrank-") as folder:
        path = Path(folder) / "answers.jsonl"
        write_answers(answered, path)
        return score(spec, path, len(answered), limits_of(runtime.settings))


def _in_every_process(task: Callable[[], Scored]) -> Scored:
    """What the first of several processes scores, or its failure.

    Raises:
        MetricError: it failed there.
    """
    told: dict[str, object] = {}
    if process_index() == 0:
        try:
            scored = task()
            told = {"value": scored.value, "items": scored.items}
        except MetricError as error:
            told = {"error": str(error)}
    told = broadcast(0, told)
    if "error" in told:
        raise MetricError(str(told["error"]))
    return Scored(told["value"], told["items"])  # type: ignore[arg-type]
