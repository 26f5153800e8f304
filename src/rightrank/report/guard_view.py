"""The guard as plain data: the trade between the task and the guard, as a figure and as a table."""

from __future__ import annotations

from rightrank.decision.run import Records
from rightrank.records.guard import GuardAnswer, GuardCandidate
from rightrank.report.figure import Axis, Figure, Level, Mark, Series, metric_axis

HOLDS = {True: "yes", False: "no"}


def guard_of(records: Records) -> GuardAnswer | None:
    """The guard of the adapter that is handed over; None without guard data."""
    return records.adapters[-1].guard if records.adapters else None


def guard_figure(records: Records) -> Figure | None:
    """Task value against guard loss, a point for each finished adapter; None without guard data."""
    guard = guard_of(records)
    if guard is None or not guard.candidates:
        return None
    rows = guard.candidates
    chosen_id = records.adapters[-1].answer.trial_id
    chosen = next(one for one in rows if one.trial_id == chosen_id)
    ranks = sorted({one.rank for one in rows}, reverse=True)
    both = sum(one.task_holds and one.guard_holds for one in rows)
    return Figure(
        name="guard_trade",
        title="The task against the guard, by rank and learning rate",
        alt=f"Worse than the base on the guard, against the task's {records.started.metric}, for {len(rows)} adapters; "
        f"{both} of them are both enough on the task and within the guard's margin. {guard.sentence}",
        x=metric_axis(records.started.metric, "held-out"),
        y=Axis("guard: worse than the base by, nats"),
        series=tuple(_series(rank, rows, place) for place, rank in enumerate(ranks)),
        levels=(Level(f"guard margin {guard.margin:g}", guard.margin), Level("base", 0.0)),
        marks=(Mark(f"handed over: rank {chosen.rank}", chosen.task_value, chosen.guard_difference),),
        columns=tuple(guard_table(guard)[0]),
        rows=tuple(
            (
                one.rank,
                one.how,
                one.learning_rate,
                one.task_value,
                one.task_difference,
                HOLDS[one.task_holds],
                one.guard_difference,
                one.guard_difference_high,
                HOLDS[one.guard_holds],
            )
            for one in rows
        ),
    )


def guard_table(guard: GuardAnswer) -> list[list[str]]:
    """Every adapter as text, a heading first."""
    heading = [
        "rank",
        "how",
        "learning rate",
        "task",
        "worse by",
        "enough",
        "guard worse by",
        "guard bound",
        "guard kept",
    ]
    return [heading, *(_row(one) for one in guard.candidates)]


def _row(one: GuardCandidate) -> list[str]:
    return [
        str(one.rank),
        one.how,
        f"{one.learning_rate:g}",
        f"{one.task_value:.4f}",
        f"{one.task_difference:+.4f}",
        HOLDS[one.task_holds],
        f"{one.guard_difference:+.4f}",
        f"{one.guard_difference_high:+.4f}",
        HOLDS[one.guard_holds],
    ]


def _series(rank: int, rows: list[GuardCandidate], place: int) -> Series:
    own = sorted((one for one in rows if one.rank == rank), key=lambda one: one.task_value)
    return Series(
        f"rank {rank}",
        tuple(one.task_value for one in own),
        tuple(one.guard_difference for one in own),
        low=tuple(one.guard_difference for one in own),
        high=tuple(one.guard_difference_high for one in own),
        kind="points",
        tone=place,
    )
