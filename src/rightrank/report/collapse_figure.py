"""The figure of the trainings that collapsed: their held-out values by step."""

from __future__ import annotations

from rightrank.decision.run import Records
from rightrank.records import TrialCollapsed
from rightrank.report.figure import Axis, Figure, Series, metric_axis

MAX_SERIES = 8  # the trainings that fell furthest; the table has all of them


def collapse_figure(records: Records) -> Figure | None:
    """Held-out values by step of the collapsed trainings; None if there are none with values."""
    collapsed = [one for one in records.outcomes if isinstance(one, TrialCollapsed) and one.points]
    if not collapsed:
        return None
    collapsed.sort(key=lambda one: -abs(one.best_value - one.value))
    shown = collapsed[:MAX_SERIES]
    series = tuple(
        Series(
            f"rank {one.rank} at {one.learning_rate:g}, seed {one.seed}",
            tuple(point.step for point in one.points),
            tuple(point.value for point in one.points),
            tone=place,
        )
        for place, one in enumerate(shown)
    )
    falls = "; ".join(f"{one.arm.label()}: {one.best_value:.4g} to {one.value:.4g}" for one in shown)
    return Figure(
        name="collapses",
        title="Trainings that collapsed",
        alt=f"Held-out {records.started.metric} by step of the trainings that collapsed. From the best to the last look: {falls}.",
        x=Axis("step"),
        y=metric_axis(records.started.metric, "held-out"),
        series=series,
        columns=("rank", "learning rate", "seed", "step", "held-out"),
        rows=tuple(
            (one.rank, one.learning_rate, one.seed, point.step, point.value)
            for one in collapsed
            for point in one.points
        ),
    )
