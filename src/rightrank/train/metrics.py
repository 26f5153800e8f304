"""The metrics that a training ends with: scores of the model's answers, and metrics of the user's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from rightrank.schema.errors import MetricError
from rightrank.schema.metrics import MetricSpec
from rightrank.schema.trials import SplitName
from rightrank.train.generation import answers
from rightrank.train.runtime import Runtime
from rightrank.train.scorers import ModelAnswer, Scored, score, write_answers
from rightrank.train.scores import exact_match, macro_f1, rouge_l, rouge_n, token_f1

TEXT_SCORES: dict[str, Callable[[str, str], float]] = {  # of the expected and the generated text
    "exact_match": exact_match,
    "f1": token_f1,
    "rouge1": partial(rouge_n, n=1),
    "rouge2": partial(rouge_n, n=2),
    "rougeL": rouge_l,
}


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics by name, with the scores of examples whose mean they are, and the reasons why some failed."""

    values: dict[str, float] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def require(self, names: Sequence[str]) -> None:
        """Check that these metrics have a value.

        Raises:
            MetricError: one of them failed.
        """
        reason = next((self.failed[name] for name in names if name in self.failed), None)
        if reason is not None:
            raise MetricError(f"{reason}; trained adapters are kept: fix the cause and run the same command again")


def measure(runtime: Runtime, split: SplitName, keep: Path | None = None) -> Measured:
    """Every metric that is measured when a training ends, on a split, under the adapter that the base now carries.

    Args:
        split: the examples to answer.
        keep: a file for the answers.
    """
    specs = [spec for spec in runtime.settings.metric_specs if not spec.is_measured_along]
    measured = Measured()
    if not specs:
        return measured
    answered = answers(runtime, split)
    if keep is not None and answered:
        write_answers(answered, keep)
    for spec in specs:
        try:
            scored = _score(spec, answered)
        except MetricError as error:
            measured.failed[spec.name] = str(error)
            continue
        measured.values[spec.name] = scored.value
        if scored.examples is not None:
            measured.items[spec.name] = scored.examples
    return measured


def _score(spec: MetricSpec, answered: Sequence[ModelAnswer]) -> Scored:
    if spec.name in TEXT_SCORES:
        text_score = TEXT_SCORES[spec.name]
        scores = [text_score(answer.expected, answer.completion) for answer in answered]
        return Scored(sum(scores) / len(scores), scores)
    if spec.name == "macro_f1":
        return Scored(*macro_f1([a.expected for a in answered], [a.completion for a in answered]))
    return score(spec, answered)
