"""The trials of a run as a pandas DataFrame."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rightrank.schema.events import Records
from rightrank.schema.trials import TrialFinished, TrialOutcome, exclude_longer_trainings

if TYPE_CHECKING:
    from pandas import DataFrame

_TRIAL_FIELDS = (
    "train_value", "trainable_parameters", "train_seconds", "train_tokens", "eval_seconds", "peak_bytes", "reason",
)  # fmt: skip


def build_trials_frame(records: Records, examples: bool) -> DataFrame:
    """Return a table with a row for each trial and its metrics, or with a row for each held-out example of each finished trial.

    The column `stage` tells complete trainings and the base model (`whole`) from longer, stopped and truncated trainings, which are
    not compared with them.
    """
    from pandas import DataFrame, concat

    usual_ids = {outcome.trial_id for outcome in exclude_longer_trainings(records.outcomes)}
    stages = {
        outcome.trial_id: outcome.arm.format_stage() or ("whole" if outcome.trial_id in usual_ids else "longer")
        for outcome in records.outcomes
    }
    if not examples:
        return DataFrame([_build_trial_row(outcome, stages[outcome.trial_id]) for outcome in records.outcomes])
    started = records.started  # The example scores of a custom trainer belong to the deciding metric.
    columns = [
        _build_example_columns(
            trial, stages[trial.trial_id], (started.metric,) if started.is_custom_trainer else trial.metrics
        )
        for trial in records.list_finished()
    ]
    frames = [DataFrame(trial_columns) for trial_columns in columns if trial_columns]
    return concat(frames, ignore_index=True) if frames else DataFrame()


def _get_identity(trial: TrialOutcome, stage: str) -> dict[str, Any]:
    arm = {name: getattr(trial, name) for name in ("rank", "learning_rate", "lora_alpha", "seed", "steps")}
    return {"trial_id": trial.trial_id, "stage": stage, **arm}


def _build_trial_row(trial: TrialOutcome, stage: str) -> dict[str, Any]:
    metrics = dict(trial.metrics) if isinstance(trial, TrialFinished) else {}
    recorded_fields = {name: getattr(trial, name) for name in _TRIAL_FIELDS if hasattr(trial, name)}
    return {**_get_identity(trial, stage), "status": trial.type.removeprefix("trial_"), **metrics, **recorded_fields}


def _build_example_columns(trial: TrialFinished, stage: str, metrics: Iterable[str]) -> dict[str, Any]:
    """Return columns with each example's score by each metric, and its weight; empty without example scores."""
    scores = {metric: items for metric in metrics if (items := trial.get_weighted_scores(metric)) is not None}
    if not scores:
        return {}
    columns: dict[str, Any] = {"item": range(len(next(iter(scores.values()))[0]))}
    for metric, (sums, weights) in scores.items():
        columns[metric] = [total / weight if weight else None for total, weight in zip(sums, weights, strict=True)]
    if trial.example_groups is not None:
        columns["group"] = trial.example_groups
    return {**_get_identity(trial, stage), **columns, "tokens": next(iter(scores.values()))[1]}
