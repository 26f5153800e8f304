"""A trial, or the decision, as one run of a tracker: its configuration, its numbers by step and by example, its summary."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from rightrank.schema.decision import Decision
from rightrank.schema.events import RunStarted
from rightrank.schema.trials import TrialFinished, TrialOutcome

Plain: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class TrackedRun:
    key: str  # the trial's identity
    name: str  # readable, and valid as a folder name
    group: str
    config: Mapping[str, Plain]
    steps: Mapping[int, Mapping[str, float]] = field(default_factory=dict)  # step → name → number
    examples: Mapping[str, list[float]] = field(default_factory=dict)  # name → one number per held-out example
    summary: Mapping[str, Plain] = field(default_factory=dict)
    failed: bool = False

    def points(self) -> Iterator[tuple[int, str, float]]:
        """Step, name and number; for numbers by example, the step is the example's index."""
        for step, values in self.steps.items():
            yield from ((step, name, value) for name, value in values.items())
        for name, scores in self.examples.items():
            yield from ((number, name, score) for number, score in enumerate(scores))

    def last_points(self) -> Iterator[tuple[int, str, float]]:
        """The numbers of the summary that no step has, at the last step."""
        written = {name for values in self.steps.values() for name in values}
        last = max(self.steps, default=0)
        yield from ((last, name, value) for name, value in self.numbers().items() if name not in written)

    def numbers(self) -> dict[str, float]:
        """The numbers of the summary."""
        return {name: value for name, value in self.summary.items() if isinstance(value, int | float)}

    def texts(self) -> dict[str, str | None]:
        """The rest of the summary."""
        return {name: value for name, value in self.summary.items() if isinstance(value, str | None)}


def tracked_trial(started: RunStarted, outcome: TrialOutcome, group: str) -> TrackedRun:
    """The trial as a run.

    A training that was stopped early, truncated or run with another alpha is no point of the curve. Its rank is logged
    as `stage_rank` and its values as `stage/…`, which keeps them apart from the others in the tracker's charts.
    """
    arm = outcome.arm
    whole = arm.is_direct and arm.init_lora_weights is None and arm.lora_alpha == started.settings.get("lora_alpha")
    config: dict[str, Plain] = {
        "lora_r" if whole else "stage_rank": arm.rank,
        "learning_rate": arm.learning_rate,
        "seed": arm.seed,
        "lora_alpha": arm.lora_alpha,
        "steps": arm.steps,
        "stage": arm.stage() or "whole",
    }
    config |= {f"settings/{name}": plain(value) for name, value in started.settings.items()}
    name = f"r{arm.rank}-lr{arm.learning_rate:g}-seed{arm.seed}-{outcome.trial_id[:6]}"
    if not isinstance(outcome, TrialFinished):
        summary = {"outcome": outcome.type, "reason": outcome.reason}
        return TrackedRun(outcome.trial_id, name, group, config, summary=summary, failed=True)
    prefix = "eval" if whole else "stage"
    return TrackedRun(
        outcome.trial_id,
        name if whole else f"stage-{outcome.trial_id}",
        group,
        config,
        steps=_steps(started, outcome, prefix),
        examples=_by_example(started.metric, outcome) if whole else {},
        summary={f"{prefix}/{metric}": value for metric, value in outcome.metrics.items()}
        | {
            "outcome": outcome.type,
            "train_seconds": outcome.train_seconds,
            "eval_seconds": outcome.eval_seconds,
            "trainable_parameters": outcome.trainable_parameters,
            "peak_bytes": outcome.peak_bytes,
        },
    )


def tracked_decision(started: RunStarted, decision: Decision, group: str) -> TrackedRun:
    """The decision as the last run of the group."""
    summary: dict[str, Plain] = {
        f"decision/{name}": plain(value)
        for name, value in decision.model_dump(mode="json").items()
        if name not in ("ranks", "staircase", "curve", "next_runs", "other_metrics", "horizon")
    }
    summary["decision/ranks"] = json.dumps([evidence.model_dump(mode="json") for evidence in decision.ranks])
    config = {f"settings/{name}": plain(value) for name, value in started.settings.items()}
    return TrackedRun("decision", "decision", group, config, summary=summary)


def plain(value: object) -> Plain:
    """The value itself if every tracker can hold it, else JSON."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _steps(started: RunStarted, trial: TrialFinished, prefix: str) -> dict[int, dict[str, float]]:
    along = started.points_metric or started.metric
    found: dict[int, dict[str, float]] = {}
    for step, loss in enumerate(trial.train_losses, start=1):
        found.setdefault(step, {})["train/loss"] = loss
    for point in trial.points:
        found.setdefault(point.step, {})[f"{prefix}/{along}"] = point.value
    last = trial.steps if trial.stop_at is None else trial.stop_at
    found.setdefault(last, {}).update({f"{prefix}/{metric}": value for metric, value in trial.metrics.items()})
    found[last]["train_seconds"] = trial.train_seconds
    return dict(sorted(found.items()))


def _by_example(metric: str, trial: TrialFinished) -> dict[str, list[float]]:
    """`items/METRIC` (the mean of each example) and the weights, for the metric that decides."""
    found = trial.items(metric)
    if found is None:
        return {}
    sums, weights = found
    return {
        f"items/{metric}": [score / weight for score, weight in zip(sums, weights, strict=True)],
        "items/tokens": list(weights),
    }
