"""The progress of a training, and the record of a trial."""

from __future__ import annotations

from pydantic import BaseModel

from rightrank.evaluation.scores import MetricResults, Scores
from rightrank.schema.trials import EvalPoint, Trial, TrialFinished


class TrainingProgress(BaseModel):
    """The progress of a training, which a checkpoint stores with the tensors."""

    step: int = 0
    train_losses: list[float] = []  # nats per label, one per step
    points: list[EvalPoint] = []
    train_seconds: float = 0.0
    train_tokens: int = 0
    eval_seconds: float = 0.0


def build_finished_trial(
    trial: Trial, metric: str, scores: Scores, metric_results: MetricResults, progress: TrainingProgress
) -> TrialFinished:
    """Build the record of a trial that trained nothing, such as the base.

    If `metric` was not measured, the value is the loss.
    """
    metrics = scores.metrics | metric_results.values
    return TrialFinished(
        **trial.fields,
        value=metrics.get(metric, scores.loss),
        value_metric=None if metric in metrics else "loss",
        metrics=metrics,
        **scores.to_record_fields(metric_results),
        failed_metrics=metric_results.failures,
        train_value=progress.points[-1].train_value if progress.points else None,
        **progress.model_dump(exclude={"step"}),
    )
