"""The figures of a run, computed from its records by pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from rightrank.decision.run import Records
from rightrank.records import Decision, TrialCollapsed, TrialFinished, TrialOutcome
from rightrank.report.adapter_view import adapter_figure
from rightrank.report.figure import (
    AnyFigure,
    Axis,
    Figure,
    HeatMap,
    Level,
    Series,
    axis_from_zero,
    best_column,
    log_ticks,
    metric_axis,
    rank_axis,
)
from rightrank.report.format import amount, coverage, metric_unit
from rightrank.report.guard_view import guard_figure
from rightrank.report.rank_curve import rank_figure
from rightrank.report.shown_trials import best_of, best_trials, by_rank, trained
from rightrank.report.training_curves import learning_figure, training_loss_figure

MAX_SERIES = 8  # the trainings that fell furthest; the table has all of them

MIB = 2**20
ENOUGH = {True: "yes", False: "no", None: "inconclusive"}  # by `RankEvidence.non_inferior`


def figures_of(records: Records, decision: Decision | None) -> list[AnyFigure]:
    """Every figure that the records support, the rank curve first."""
    figures: list[AnyFigure | None] = []
    if decision is not None:
        figures += [rank_figure(decision), staircase_figure(decision), difference_figure(decision)]
    figures += [
        learning_figure(records, decision),
        training_loss_figure(records),
        collapse_figure(records),
        adapter_figure(records) or truncation_figure(records),
        guard_figure(records),
        learning_rate_map(records),
        memory_figure(records),
        time_figure(records),
    ]
    return [figure for figure in figures if figure is not None]


def margin_steps(decision: Decision) -> list[tuple[float, int]]:
    """`(margin, rank)`: the rank that is enough from this margin on. The first margin is 0."""
    steps = [(step.margin, step.rank) for step in decision.staircase]
    return steps if steps and steps[0][0] == 0 else [(0.0, decision.reference_rank), *steps]


def rank_at(steps: Sequence[tuple[float, int]], margin: float) -> int:
    """The rank that is enough at a margin."""
    return next(rank for needed, rank in reversed(steps) if needed <= margin)


def margin_range(decision: Decision) -> tuple[float, float]:
    """The interesting margins: from below the first step to above the one at which the smallest rank is enough."""
    needed = [margin for margin, _ in margin_steps(decision) if margin > 0]
    return min([decision.margin / 5, *(m / 2 for m in needed)]), max([decision.margin * 5, *(m * 2 for m in needed)])


def staircase_figure(decision: Decision) -> Figure:
    """Margin → rank as a staircase."""
    steps = margin_steps(decision)
    low, high = margin_range(decision)
    corners = [(low, rank_at(steps, low))] + [step for step in steps if low < step[0] < high]
    corners.append((high, rank_at(steps, high)))
    ranks = sorted({rank for _, rank in corners})
    steps_text = "; ".join(f"from {needed:.2g} on, rank {rank}" for needed, rank in corners[1:-1])
    return Figure(
        name="staircase",
        title="Which rank is enough at which margin",
        alt=f"Staircase of the smallest rank shown to be enough. At a margin of {low:.2g}, rank {corners[0][1]}"
        + (f"; {steps_text}." if steps_text else " at every margin shown."),
        x=Axis(f"margin, {metric_unit(decision.metric)}", "log10", log_ticks(low, high), (low, high)),
        y=Axis("smallest rank enough", "log2", tuple(ranks)),
        series=(
            Series("enough", tuple(c[0] for c in corners), tuple(c[1] for c in corners), kind="step", tone="main"),
        ),
        columns=("margin from", "rank"),
        rows=tuple(steps),
    )


def difference_figure(decision: Decision) -> Figure | None:
    """The paired difference of each rank from the reference, with the bounds that are tested."""
    rows = [e for e in trained(decision) if e.difference is not None]
    if len(rows) < 2:
        return None
    differences = [e.difference or 0.0 for e in rows]
    lows = [d if e.difference_low is None else e.difference_low for d, e in zip(differences, rows, strict=True)]
    highs = [d if e.difference_high is None else e.difference_high for d, e in zip(differences, rows, strict=True)]
    enough = [str(e.rank) for e in rows if e.non_inferior]
    return Figure(
        name="paired_differences",
        title=f"Worse than rank {decision.reference_rank} by, paired",
        alt=f"Paired difference of every rank from rank {decision.reference_rank} with its bounds. "
        f"Below the margin of {decision.margin:.4g}: " + (f"rank {', '.join(enough)}." if enough else "none."),
        x=rank_axis([e.rank for e in rows]),
        y=Axis(f"worse by, {metric_unit(decision.metric)}"),
        series=(
            Series(
                f"difference and its one-sided {coverage(decision, 'bounds')}",
                tuple(e.rank for e in rows),
                tuple(differences),
                low=tuple(min(d, low) for d, low in zip(differences, lows, strict=True)),
                high=tuple(max(d, high) for d, high in zip(differences, highs, strict=True)),
                kind="points",
            ),
        ),
        levels=(Level(f"margin {decision.margin:.4g}", decision.margin), Level("", 0.0)),
        columns=("rank", "difference", "lower bound", "upper bound", "enough", "optimism of the best learning rate"),
        rows=tuple(
            (e.rank, d, low, high, ENOUGH[e.non_inferior], e.winner_gap)
            for e, d, low, high in zip(rows, differences, lows, highs, strict=True)
        ),
    )


def truncation_figure(records: Records) -> Figure | None:
    """The scores of an adapter truncated to lower ranks, next to trainings at those ranks."""
    finished = records.finished()
    truncations = [trial for trial in finished if trial.truncate_from is not None]
    if not truncations:
        return None
    direct = best_trials(records, None)
    parents = {trial.trial_id: trial for trial in finished}
    truncated_values = {rank: best_of(trials, records).value for rank, trials in by_rank(truncations).items()}
    trained_values = {rank: trials[0].value for rank, trials in direct.items()}
    whole = sorted({parents[trial.truncate_from].rank for trial in truncations if trial.truncate_from in parents})
    ranks = sorted({*truncated_values, *trained_values})
    series = [
        Series(
            "truncated, best of each rank",
            tuple(truncated_values),
            tuple(truncated_values.values()),
            dashed=True,
            tone="second",
        )
    ]
    if trained_values:
        series.append(Series("trained at that rank", tuple(trained_values), tuple(trained_values.values())))
    origin = f"rank {', '.join(map(str, whole))}" if whole else "a higher rank"
    return Figure(
        name="truncations",
        title=f"Adapters of {origin} truncated to lower ranks",
        alt=f"Held-out {records.started.metric} of truncated adapters next to trainings. Truncated: {_listed(truncated_values, '')}. "
        f"Trained: {_listed(trained_values, '')}.",
        x=rank_axis(ranks),
        y=metric_axis(records.started.metric, "held-out"),
        series=tuple(series),
        columns=("rank", "truncated", "trained"),
        rows=tuple((rank, truncated_values.get(rank), trained_values.get(rank)) for rank in ranks),
    )


def learning_rate_map(records: Records) -> HeatMap | None:
    """Rank × learning rate: the mean value of each cell, with the best of each rank marked.

    It shows complete trainings with the settings that all ranks share.
    """
    arms = [outcome for outcome in records.plain() if outcome.rank > 0 and outcome.truncate_from is None]
    ranks = sorted({outcome.rank for outcome in arms})
    learning_rates = sorted({outcome.learning_rate for outcome in arms})
    finished = [outcome for outcome in arms if isinstance(outcome, TrialFinished)]
    if not finished:
        return None
    values: list[tuple[float | None, ...]] = []
    notes: list[tuple[str, ...]] = []
    for rank in ranks:
        cells = [[o for o in arms if (o.rank, o.learning_rate) == (rank, lr)] for lr in learning_rates]
        done = [[o.value for o in cell if isinstance(o, TrialFinished) and o.arm.is_direct] for cell in cells]
        values.append(tuple(fmean(cell) if cell else None for cell in done))
        notes.append(tuple(_cell_note(c, len(d)) for c, d in zip(cells, done, strict=True)))
    lower = not records.started.higher_is_better
    best = tuple(best_column(row, lower) for row in values)
    best_text = ", ".join(
        f"rank {rank} at {learning_rates[column]:g}"
        for rank, column in zip(ranks, best, strict=True)
        if column is not None
    )
    return HeatMap(
        name="rate_by_rank",
        title="Learning rate by rank",
        alt=f"Held-out {records.started.metric} of every rank and learning rate. Best learning rates: {best_text}.",
        row_label="rank",
        column_label="learning rate",
        row_names=tuple(str(rank) for rank in ranks),
        column_names=tuple(f"{lr:g}" for lr in learning_rates),
        values=tuple(values),
        notes=tuple(notes),
        best=best,
        lower_is_better=lower,
    )


def memory_figure(records: Records) -> Figure | None:
    """Peak memory by rank: measured, and planned for the same trainings.

    On a CPU, the measured peak is of the whole process and the planned one of the tensors: like is drawn with like, so the
    plan is among the numbers alone.
    """
    trained = by_rank([trial for trial in records.finished() if trial.steps > 0 and trial.peak_bytes > 0])
    highest = {rank: max(trials, key=lambda t: t.peak_bytes) for rank, trials in trained.items() if rank > 0}
    peaks = {rank: trial.peak_bytes / MIB for rank, trial in highest.items()}
    planned = {rank: trial.predicted_peak_bytes / MIB for rank, trial in highest.items() if trial.predicted_peak_bytes}
    if not peaks:
        return None
    on_cpu = records.started.environment.get("device") == "cpu"
    series = [Series("measured", tuple(peaks), tuple(peaks.values()))]
    if planned and not on_cpu:
        series.append(Series("planned", tuple(planned), tuple(planned.values()), dashed=True, tone="second"))
    return Figure(
        name="memory",
        title="Peak memory of a training" + (", whole process" if on_cpu else ""),
        alt=f"Peak memory by rank: {_listed(peaks, 'MiB')}.",
        x=rank_axis(list(peaks)),
        y=axis_from_zero("peak memory, MiB", [*peaks.values(), *planned.values()]),
        series=tuple(series),
        columns=("rank", "measured MiB", "planned, tensors only, MiB" if on_cpu else "planned MiB"),
        rows=tuple((rank, peak, planned.get(rank)) for rank, peak in peaks.items()),
    )


def time_figure(records: Records) -> Figure | None:
    """Mean seconds of training and of evaluation by rank."""
    direct = [trial for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct]
    groups = by_rank(direct)
    if not groups:
        return None
    train = {rank: fmean(trial.train_seconds for trial in trials) for rank, trials in groups.items()}
    evaluation = {rank: fmean(trial.eval_seconds for trial in trials) for rank, trials in groups.items()}
    return Figure(
        name="time",
        title="Time of a training",
        alt=f"Seconds per training by rank: {_listed(train, 's')}.",
        x=rank_axis(list(train)),
        y=axis_from_zero("seconds", [*train.values(), *evaluation.values()]),
        series=(
            Series("training", tuple(train), tuple(train.values())),
            Series("evaluation", tuple(evaluation), tuple(evaluation.values()), tone="second"),
        ),
        columns=("rank", "training seconds", "evaluation seconds"),
        rows=tuple((rank, train[rank], evaluation[rank]) for rank in train),
    )


def _cell_note(outcomes: Sequence[TrialOutcome], finished: int) -> str:
    if not outcomes:
        return "not tried"
    if finished == 0:
        stages = [o.stop_at for o in outcomes if isinstance(o, TrialFinished) and o.stop_at is not None]
        return f"stopped at step {max(stages)}" if stages else "no result"
    return f"×{finished}" if finished > 1 else ""


def _listed(values: Mapping[int, float], unit: str) -> str:
    return ", ".join(f"rank {rank} {amount(value)} {unit}" for rank, value in values.items())


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
