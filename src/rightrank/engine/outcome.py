"""The progress of a training, and the records in which it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from rightrank.engine.evaluation import Scores
from rightrank.engine.runtime import Runtime
from rightrank.engine.scoring import Measured
from rightrank.records import EvalPoint, Trial, TrialDiverged, TrialFinished


class Diverged(Exception):  # noqa: N818 - an outcome, turned into a record
    """The training diverged. It ends, and the other arms of the pass continue."""

    def __init__(self, trial: Trial, step: int, reason: str) -> None:
        super().__init__(reason)
        self.trial = trial
        self.step = step
        self.reason = reason

    def outcome(self) -> TrialDiverged:
        return TrialDiverged(**self.trial.fields, step=self.step, reason=self.reason)


@dataclass(slots=True)
class Progress:
    """What a checkpoint stores beside tensors."""

    step: int = 0
    train_losses: list[float] = field(default_factory=list)  # nats per label, one per step
    points: list[EvalPoint] = field(default_factory=list)
    train_seconds: float = 0.0
    train_tokens: int = 0
    eval_seconds: float = 0.0
    answer_seconds: float = 0.0  # part of eval_seconds: the metrics at the end

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        found = {one.name: state[one.name] for one in fields(cls) if one.name in state}
        return cls(**found | {"points": [EvalPoint.model_validate(point) for point in state["points"]]})

    def state(self) -> dict[str, Any]:
        found = {one.name: getattr(self, one.name) for one in fields(self)}
        return found | {"points": [point.model_dump() for point in self.points]}


@dataclass(frozen=True, slots=True)
class Evaluation:
    scores: Scores
    measured: Measured | None  # None: the trial stopped early and is judged by its loss
    averaged_loss: float | None = None  # held-out, of the running mean of the parameters; early looks

    def value(self, metric: str) -> tuple[float, str | None]:
        """`(value, None)` of the metric, or `(loss, "loss")` if it was not measured."""
        values = self.values()
        return (values[metric], None) if metric in values else (self.scores.loss, "loss")

    def values(self) -> dict[str, float]:
        return self.scores.metrics | (self.measured.values if self.measured else {})


def finished(
    trial: Trial,
    runtime: Runtime,
    progress: Progress,
    evaluation: Evaluation,
    parameters: int,
    peak_bytes: int,
    pass_ranks: Sequence[int],
) -> TrialFinished:
    """The record of a trial; `pass_ranks` are the ranks of the arms in its fullest pass, its own first."""
    scores, measured = evaluation.scores, evaluation.measured or Measured()
    value, value_metric = evaluation.value(runtime.settings.metric_name)
    return TrialFinished(
        **trial.fields,
        value=value,
        value_metric=value_metric,
        metrics=evaluation.values(),
        **scores.fields | {"item_metrics": scores.item_metrics | measured.items},
        failed_metrics=measured.failed,
        averaged_loss=evaluation.averaged_loss,
        train_value=progress.points[-1].train_value if progress.points else None,
        points=progress.points,
        trainable_parameters=parameters,
        train_seconds=progress.train_seconds,
        train_tokens=progress.train_tokens,
        eval_seconds=progress.eval_seconds,
        answer_seconds=progress.answer_seconds,
        peak_bytes=peak_bytes,
        adapters_per_pass=len(pass_ranks),
        pass_ranks=list(pass_ranks),
        train_losses=progress.train_losses,
    )
