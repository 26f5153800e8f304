"""The figures of a run, computed from its records by pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from statistics import fmean

from rightrank.decision.run import Records
from rightrank.report.adapters import adapter_figure, guard_figure
from rightrank.report.answer import ENOUGH
from rightrank.report.curves import by_rank, learning_figure, trained, training_loss_figure
from rightrank.report.figure import (
    AnyFigure,
    Axis,
    Band,
    Figure,
    HeatMap,
    Level,
    Mark,
    Series,
    axis_from_zero,
    heat_map,
    log_ticks,
    metric_axis,
    rank_axis,
)
from rightrank.report.format import amount, coverage, metric_unit
from rightrank.schema.decision import Decision, RankEvidence
from rightrank.schema.trials import TrialCollapsed, TrialFinished, TrialOutcome


def rank_figure(decision: Decision) -> Figure:
    """Each rank at its best learning rate, with the tested bound, the margin band, the base and the chosen rank.

    The whisker of a rank ends at the reference's value plus the upper bound of the paired difference: a rank is
    enough if its whisker ends inside the band. The interval of a single value is many times wider, because all ranks
    share the held-out examples; the figure's rows hold it.
    """
    trained = [evidence for evidence in decision.ranks if evidence.rank > 0]
    base = next((evidence.value for evidence in decision.ranks if evidence.rank == 0), None)
    reference = next(evidence for evidence in trained if evidence.rank == decision.reference_rank)
    sign = -1 if decision.higher_is_better else 1
    ends = [e.value if e.difference_high is None else reference.value + sign * e.difference_high for e in trained]
    ranks = tuple(e.rank for e in trained)
    points = Series(
        f"held-out, best learning rate; whisker: paired {coverage(decision, 'bound')}",
        ranks,
        tuple(e.value for e in trained),
        tuple(min(e.value, end) for e, end in zip(trained, ends, strict=True)),
        tuple(max(e.value, end) for e, end in zip(trained, ends, strict=True)),
    )
    edge = reference.value + sign * decision.margin
    band = Band("within the margin of the best", min(reference.value, edge), max(reference.value, edge))
    limits = _limits([*points.low, *points.high, band.low, band.high], base)
    values = ", ".join(f"rank {e.rank} {e.value:.4f}" for e in trained)
    return Figure(
        name="rank_curve",
        title="Performance against rank",
        alt=f"Held-out {decision.metric} against LoRA rank: {values}"
        + (f"; base without an adapter {base:.4f}" if base is not None else "")
        + f". {decision.sentence}",
        x=rank_axis(ranks),
        y=metric_axis(decision.metric, "held-out", limits),
        series=(points,),
        bands=(band,),
        levels=() if base is None else (_base_level(base, limits),),
        marks=tuple(_marks(decision, trained)),
        columns=("rank", "value", "low", "high", "paired bound"),
        rows=tuple((e.rank, e.value, e.low, e.high, e.difference_high) for e in decision.ranks),
    )


def _limits(values: list[float], base: float | None) -> tuple[float, float]:
    """The limits of the y axis: all of `values`, and the base unless that shrinks them to less than a third."""
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    if base is not None and max(high, base) - min(low, base) <= 3 * spread:
        low, high = min(low, base), max(high, base)
    room = 0.08 * ((high - low) or spread)
    return low - room, high + room


def _base_level(base: float, limits: tuple[float, float]) -> Level:
    """The base as a line; a base off the scale is drawn at the edge and labelled so."""
    low, high = limits
    if low <= base <= high:
        return Level(f"base, no adapter: {base:.4g}", base)
    inside = min(max(base, low + 0.01 * (high - low)), high - 0.01 * (high - low))
    return Level(f"base, no adapter: {base:.4g} (off the scale)", inside)


def diminishing_rank(decision: Decision) -> int | None:
    """The smallest rank from which no measured doubling gains more than the margin; None if the last one still does.

    It depends on the margin and on the ranks tried.
    """
    ranks = sorted((e for e in decision.ranks if e.rank > 0), key=lambda e: e.rank)
    sign = -1 if decision.higher_is_better else 1
    found = None
    for lower, upper in reversed(list(pairwise(ranks))):
        gain = sign * (lower.value - upper.value) / log2(upper.rank / lower.rank)
        if gain > decision.margin:
            break
        found = lower.rank
    return found


def _marks(decision: Decision, trained: list[RankEvidence]) -> list[Mark]:
    values = {e.rank: e.value for e in trained}
    marks: list[Mark] = []
    diminishing = diminishing_rank(decision)
    if diminishing is not None:
        marks.append(Mark("doubling gains less than the margin", diminishing, values[diminishing], "second"))
    chosen = decision.rank_at_hand
    refused = any(e.rank == chosen and e.non_inferior is False for e in trained)
    if chosen in values and not refused:
        fallback = "shown to be enough so far" if decision.fallback_rank is not None else "best so far"
        label = "chosen" if decision.rank is not None else fallback
        marks.append(Mark(f"{label}: rank {chosen}", chosen, values[chosen]))
    return marks


MAX_SERIES = 8  # the trainings that fell furthest; the table has all of them

MIB = 2**20


def figures_of(records: Records, decision: Decision | None) -> list[AnyFigure]:
    """Every figure that the records support, the rank curve first."""
    figures: list[AnyFigure | None] = []
    if decision is not None:
        figures += [rank_figure(decision), _staircase_figure(decision), _difference_figure(decision)]
    figures += [
        learning_figure(records, decision),
        training_loss_figure(records),
        _collapse_figure(records),
        adapter_figure(records),
        guard_figure(records),
        learning_rate_map(records),
        memory_figure(records),
        _time_figure(records),
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


def _staircase_figure(decision: Decision) -> Figure:
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
        marks=(Mark("this margin", decision.margin, rank_at(steps, decision.margin)),),
        columns=("margin from", "rank"),
        rows=tuple(steps),
    )


def _difference_figure(decision: Decision) -> Figure | None:
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


def learning_rate_map(records: Records) -> HeatMap | None:
    """Rank × learning rate: the mean value of each cell, with the best of each rank marked.

    It shows complete trainings with the settings that all ranks share.
    """
    arms = [outcome for outcome in records.outcomes if outcome.rank > 0 and outcome.truncate_from is None]
    if not any(isinstance(outcome, TrialFinished) for outcome in arms):
        return None
    cells: dict[tuple[str, str], tuple[float | None, str]] = {}
    for rank in sorted({outcome.rank for outcome in arms}):
        for rate in sorted({outcome.learning_rate for outcome in arms}):
            cell = [outcome for outcome in arms if (outcome.rank, outcome.learning_rate) == (rank, rate)]
            done = [outcome.value for outcome in cell if isinstance(outcome, TrialFinished) and outcome.arm.is_direct]
            cells[str(rank), f"{rate:g}"] = fmean(done) if done else None, _cell_note(cell, len(done))
    metric, higher = records.started.metric, records.started.higher_is_better
    alt = f"Held-out {metric} of every rank and learning rate."
    return heat_map("rate_by_rank", "Learning rate by rank", alt, ("rank", "learning rate"), cells, not higher)


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


def _time_figure(records: Records) -> Figure | None:
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


def _collapse_figure(records: Records) -> Figure | None:
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
