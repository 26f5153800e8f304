"""The metrics that a training ends with: scores of the model's answers, and metrics of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rightrank.schema.errors import MetricError
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.settings import SelectSettings
from rightrank.schema.trials import SplitName
from rightrank.train.generation import answers
from rightrank.train.runtime import Runtime
from rightrank.train.scorers import ModelAnswer, Scored, require_scorer, score, write_answers
from rightrank.train.scores import exact_match, macro_f1, macro_f1_shares, rouge_l, rouge_n, token_f1

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


def require_scorers(settings: SelectSettings) -> None:
    """Check before anything is loaded that every metric can be measured.

    Raises:
        SettingsError: a metric can't be measured.
    """
    for spec in settings.metric_specs:
        require_scorer(spec)


def measure(runtime: Runtime, split: SplitName, keep: Path | None = None) -> Measured:
    """Every end metric on a split, under the adapter that the base now carries.

    Args:
        split: the examples to answer.
        keep: a file for the answers.
    """
    specs = end_metrics(runtime.settings)
    measured = Measured()
    if not specs:
        return measured
    answered = answers(runtime, split)
    if keep is not None and answered:
        write_answers(answered, keep)
    for spec in specs:
        try:
            measured.scored[spec.name] = _score(spec, answered)
        except MetricError as error:
            measured.failed[spec.name] = str(error)
    return measured


def _score(spec: MetricSpec, answered: Sequence[ModelAnswer]) -> Scored:
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        return Scored.of_examples([text_score(answer.expected, answer.completion) for answer in answered])
    if spec.name == "macro_f1":
        sides = [a.expected for a in answered], [a.completion for a in answered]
        return Scored(macro_f1(*sides), macro_f1_shares(*sides))
    return score(spec, answered)
