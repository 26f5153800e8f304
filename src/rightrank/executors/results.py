"""What a custom trainer returned, checked, and the outcome that it becomes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rightrank.errors import quoted
from rightrank.executors.calls import TrainerError
from rightrank.records import EvalPoint, Trial, TrialFinished, TrialResult


def merged(reported: Sequence[EvalPoint], returned: Sequence[EvalPoint]) -> list[EvalPoint]:
    """The looks of a trial by step; one that was returned replaces one that was reported."""
    by_step = {point.step: point for point in (*reported, *returned)}
    return [by_step[step] for step in sorted(by_step)]


def parse_result(returned: object, metric: str, examples: int | None) -> TrialResult:
    """Check what a trainer returned and convert it to a `TrialResult`.

    Raises:
        TrainerError: not a mapping of numbers, the metric is missing, or scores of other examples than before.
    """
    if isinstance(returned, Mapping):
        metrics: dict[str, float] = {}
        for name, value in returned.items():
            if not isinstance(name, str) or isinstance(value, bool) or not hasattr(value, "__float__"):
                raise TrainerError(
                    f"train returned {name!r}: {type(value).__name__} {quoted(value)}; return names with numbers"
                )
            metrics[name] = float(value)
        returned = TrialResult(metrics=metrics)
    if not isinstance(returned, TrialResult):
        raise TrainerError(
            f"train returned {type(returned).__name__} {quoted(returned)}; return a mapping such as {{{metric!r}: 1.23}}, or a TrialResult"
        )
    if metric not in returned.metrics:
        found = ", ".join(map(repr, returned.metrics)) or "nothing"
        other = f"metric={next(iter(returned.metrics))!r}" if returned.metrics else "another metric="
        raise TrainerError(f"train returned no {metric!r} (it returned {found}); return it, or give {other}")
    scores, weights = returned.item_scores, returned.item_weights
    if scores is not None and len(scores) == 0:
        raise TrainerError("train returned an empty list of item_scores; return one score per example, or None")
    if scores is not None and examples is not None and len(scores) != examples:
        raise TrainerError(
            f"train returned {len(scores)} item_scores, earlier trials {examples}; score the same examples in the same order in every trial"
        )
    if weights is not None and (scores is None or len(weights) != len(scores) or min(weights) <= 0):
        raise TrainerError(
            "train returned item_weights that do not match item_scores; return one weight above 0 per example"
        )
    return returned


def outcome_of(trial: Trial, result: TrialResult, metric: str, seconds: float) -> TrialFinished:
    returned = dict(result) | {"train_seconds": seconds if result.train_seconds is None else result.train_seconds}
    return TrialFinished(**trial.fields, **returned, value=result.metrics[metric], item_losses=[], item_tokens=[])


def numbers_of(result: TrialResult) -> Iterator[tuple[str, float]]:
    yield from result.metrics.items()
    yield from (("an example's score", score) for score in result.item_scores or [])
    if result.train_value is not None:
        yield "train_value", result.train_value
    yield from (("a point's value", point.value) for point in result.points)
    yield from (("a point's score", score) for point in result.points for score in point.item_scores or [])
