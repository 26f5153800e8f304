"""Figures of a run, computed from its records: ranks, adapters, learning curves, memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from statistics import fmean

from rightrank.decision.records import Records, compared, metric_direction
from rightrank.report.evidence_tables import ENOUGH, format_interval_label, get_metric_unit
from rightrank.report.figure import (
    Axis,
    Band,
    Figure,
    Level,
    Mark,
    Series,
    Tone,
    build_metric_axis,
    build_rank_axis,
    build_zero_based_axis,
    compute_log_ticks,
)
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, RankEvidence
from rightrank.schema.trials import TrialFinished


def build_rank_figure(decision: Decision) -> Figure:
    """Plot each rank at its best learning rate, with the tested bound, the margin band, the base model and the chosen rank.

    The whisker of a rank ends at the reference's value plus the upper bound of the paired difference, so a rank is
    enough if its whisker ends inside the band. The interval of a single value is many times wider, because all ranks
    share the held-out examples; it is listed in the figure's rows.
    """
    trained = [evidence for evidence in decision.ranks if evidence.rank > 0]
    base = next((evidence.value for evidence in decision.ranks if evidence.rank == 0), None)
    reference = next(evidence for evidence in trained if evidence.rank == decision.reference_rank)
    sign = -1 if decision.higher_is_better else 1
    ends = [e.value if e.difference_high is None else reference.value + sign * e.difference_high for e in trained]
    ranks = tuple(e.rank for e in trained)
    points = Series(
        f"held-out, best learning rate; whisker: paired {format_interval_label(decision, 'bound')}",
        ranks,
        tuple(e.value for e in trained),
        tuple(min(e.value, end) for e, end in zip(trained, ends, strict=True)),
        tuple(max(e.value, end) for e, end in zip(trained, ends, strict=True)),
    )
    edge = reference.value + sign * decision.margin
    band = Band("within the margin of the best", min(reference.value, edge), max(reference.value, edge))
    limits = _compute_limits([*points.low, *points.high, band.low, band.high], base)
    levels: list[Level] = []
    if base is not None:  # A base value off the scale is drawn at the edge and labelled.
        room = 0.01 * (limits[1] - limits[0])
        visible_value = min(max(base, limits[0] + room), limits[1] - room)
        off_scale_text = "" if limits[0] <= base <= limits[1] else " (off the scale)"
        levels.append(Level(f"base, no adapter: {base:.4g}{off_scale_text}", visible_value if off_scale_text else base))
    values = ", ".join(f"rank {e.rank} {e.value:.4f}" for e in trained)
    return Figure(
        name="rank_curve",
        title="Performance against rank",
        alt=f"Held-out {decision.metric} against LoRA rank: {values}"
        + (f"; base without an adapter {base:.4f}" if base is not None else "")
        + f". {decision.sentence}",
        x=build_rank_axis(ranks),
        y=build_metric_axis(decision.metric, decision.higher_is_better, limits),
        series=(points,),
        bands=(band,),
        levels=tuple(levels),
        marks=tuple(_build_marks(decision, trained)),
        columns=("rank", "value", "low", "high", "paired bound"),
        rows=tuple((e.rank, e.value, e.low, e.high, e.difference_high) for e in decision.ranks),
    )


def _compute_limits(values: list[float], base: float | None) -> tuple[float, float]:
    """Return the limits of the y axis.

    They include all of `values`, and also the base model unless that would compress the values into less than a third of the axis.
    """
    low, high = min(values), max(values)
    value_range = (high - low) or abs(high) or 1.0
    if base is not None and max(high, base) - min(low, base) <= 3 * value_range:
        low, high = min(low, base), max(high, base)
    padding = 0.08 * ((high - low) or value_range)
    return low - padding, high + padding


def _find_diminishing_rank(decision: Decision) -> int | None:
    """Return the smallest rank from which no measured doubling gains more than the margin; None if the last one still does.

    The result depends on the margin and on the ranks that were tried.
    """
    ranks = [e for e in decision.ranks if e.rank > 0]
    sign = -1 if decision.higher_is_better else 1
    smallest = None
    for lower, upper in reversed(list(pairwise(ranks))):
        gain = sign * (lower.value - upper.value) / log2(upper.rank / lower.rank)
        if gain > decision.margin:
            break
        smallest = lower.rank
    return smallest


def _build_marks(decision: Decision, trained: list[RankEvidence]) -> list[Mark]:
    values = {e.rank: e.value for e in trained}
    marks: list[Mark] = []
    diminishing = _find_diminishing_rank(decision)
    if diminishing is not None:
        marks.append(Mark("doubling gains less than the margin", diminishing, values[diminishing], "second"))
    chosen = decision.best_available_rank
    refused = any(e.rank == chosen and e.non_inferior is False for e in trained)
    if chosen in values and not refused:
        fallback = "shown to be enough so far" if decision.fallback_rank is not None else "best so far"
        label = "chosen" if decision.rank is not None else fallback
        marks.append(Mark(f"{label}: rank {chosen}", chosen, values[chosen]))
    return marks


MIB = 2**20


def build_figures(records: Records, decision: Decision | None) -> list[Figure]:
    """Build every figure that the records support, the rank curve first."""
    figures: list[Figure | None] = []
    if decision is not None:
        figures += [build_rank_figure(decision), _build_staircase_figure(decision)]
    figures += [
        _build_learning_figure(records, decision),
        build_adapter_figure(records),
        _build_memory_figure(records),
        _build_time_figure(records),
    ]
    return [figure for figure in figures if figure is not None]


def build_margin_steps(decision: Decision) -> list[tuple[float, int]]:
    """Return `(margin, rank)` pairs: from each margin on, this rank is enough. The first margin is 0."""
    steps = [(step.margin, step.rank) for step in decision.staircase]
    return steps if steps and steps[0][0] == 0 else [(0.0, decision.reference_rank), *steps]


def _find_rank_at_margin(steps: Sequence[tuple[float, int]], margin: float) -> int:
    """Return the smallest rank that is enough at a margin."""
    return next(rank for needed, rank in reversed(steps) if needed <= margin)


def _build_staircase_figure(decision: Decision) -> Figure:
    """Plot the smallest sufficient rank against the margin."""
    steps = build_margin_steps(decision)
    margins = [margin for margin, _ in steps if margin > 0]
    # Start below the first step and end above the one at which the smallest rank is enough.
    low, high = (
        min([decision.margin / 5, *(m / 2 for m in margins)]),
        max([decision.margin * 5, *(m * 2 for m in margins)]),
    )
    corners = [(low, _find_rank_at_margin(steps, low))] + [step for step in steps if low < step[0] < high]
    corners.append((high, _find_rank_at_margin(steps, high)))
    ranks = sorted({rank for _, rank in corners})
    steps_text = "; ".join(f"from {margins:.2g} on, rank {rank}" for margins, rank in corners[1:-1])
    return Figure(
        name="staircase",
        title="Which rank is enough at which margin",
        alt=f"Staircase of the smallest rank whose bound is within the margin. At a margin of {low:.2g}, rank {corners[0][1]}"
        + (f"; {steps_text}." if steps_text else " at every margin shown."),
        x=Axis(f"margin, {get_metric_unit(decision.metric)}", "log10", compute_log_ticks(low, high), (low, high)),
        y=Axis("smallest rank enough", "log2", tuple(ranks)),
        series=(
            Series("enough", tuple(c[0] for c in corners), tuple(c[1] for c in corners), kind="step", tone="main"),
        ),
        marks=(Mark("this margin", decision.margin, _find_rank_at_margin(steps, decision.margin)),),
        columns=("margin from", "rank"),
        rows=tuple(steps),
    )


def _build_memory_figure(records: Records) -> Figure | None:
    """Plot peak memory by rank, measured and planned for the same trainings.

    On a CPU the measured peak covers the entire process and the planned one only tensors. They are not comparable there, so the
    plan is listed among the numbers but not drawn.
    """
    trials_by_rank = _group_by_rank([trial for trial in records.finished() if trial.steps > 0 and trial.peak_bytes > 0])
    highest = {rank: max(trials, key=lambda t: t.peak_bytes) for rank, trials in trials_by_rank.items() if rank > 0}
    peaks = {rank: trial.peak_bytes / MIB for rank, trial in highest.items()}
    planned = {rank: trial.predicted_peak_bytes / MIB for rank, trial in highest.items() if trial.predicted_peak_bytes}
    if not peaks:
        return None
    on_cpu = records.started.environment.get("device") == "cpu"
    series = [Series("measured", tuple(peaks), tuple(peaks.values()))]
    if planned and not on_cpu:
        series.append(Series("planned", tuple(planned), tuple(planned.values()), dashed=True, tone="second"))
    columns = {"measured MiB": peaks, "planned, tensors only, MiB" if on_cpu else "planned MiB": planned}
    title = "Peak memory of a training" + (", whole process" if on_cpu else "")
    alt = f"Peak memory by rank: {_format_rank_values(peaks, 'MiB')}."
    return _build_cost_figure("memory", title, alt, "peak memory, MiB", series, columns)


def _build_time_figure(records: Records) -> Figure | None:
    """Plot the mean seconds of training and of evaluation by rank."""
    groups = _group_by_rank([trial for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct])
    if not any(trial.seconds for trials in groups.values() for trial in trials):  # A table may have no times.
        return None
    train = {rank: fmean(trial.train_seconds for trial in trials) for rank, trials in groups.items()}
    evaluation = {rank: fmean(trial.eval_seconds for trial in trials) for rank, trials in groups.items()}
    series = [
        Series("training", tuple(train), tuple(train.values())),
        Series("evaluation", tuple(evaluation), tuple(evaluation.values()), tone="second"),
    ]
    alt = f"Seconds per training by rank: {_format_rank_values(train, 's')}."
    columns = {"training seconds": train, "evaluation seconds": evaluation}
    return _build_cost_figure("time", "Time of a training", alt, "seconds", series, columns)


def _build_cost_figure(
    name: str, title: str, alt: str, label: str, series: Sequence[Series], columns: Mapping[str, Mapping[int, float]]
) -> Figure:
    """Plot a cost of training by rank. `columns` are the figure's numbers; the first column has a value for every rank."""
    first, *_ = columns.values()
    values = [value for column in columns.values() for value in column.values()]
    rows = tuple((rank, *(column.get(rank) for column in columns.values())) for rank in first)
    return Figure(
        name=name,
        title=title,
        alt=alt,
        x=build_rank_axis(list(first)),
        y=build_zero_based_axis(label, values),
        series=tuple(series),
        columns=("rank", *columns),
        rows=rows,
    )


def _format_rank_values(values: Mapping[int, float], unit: str) -> str:
    texts = {rank: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for rank, value in values.items()}
    return ", ".join(f"rank {rank} {text} {unit}" for rank, text in texts.items())


def _select_best_trials(records: Records, decision: Decision | None) -> dict[int, list[TrialFinished]]:
    """Return the trials of each rank at its best learning rate, as the decision names them if there is one."""
    by_id = records.by_id
    if decision is not None:
        named = {e.rank: [by_id[i] for i in e.trial_ids if i in by_id] for e in decision.ranks if e.rank > 0}
        return {rank: trials for rank, trials in named.items() if trials}
    groups = _group_by_rank([trial for trial in by_id.values() if trial.rank > 0 and trial.arm.is_direct])
    sign = -1 if records.started.higher_is_better else 1
    return {rank: [min(trials, key=lambda trial: sign * trial.value)] for rank, trials in groups.items()}


def _group_by_rank(trials: Sequence[TrialFinished]) -> dict[int, list[TrialFinished]]:
    """Group trials by rank, ranks ascending."""
    ranks = sorted({trial.rank for trial in trials})
    return {rank: [trial for trial in trials if trial.rank == rank] for rank in ranks}


# Fraction of the steps whose values may be off the scale. Otherwise the end of the curve would look flat.
FIRST_SHOWN = 0.1


def _build_learning_figure(records: Records, decision: Decision | None) -> Figure | None:
    """Plot held-out values and the training loss by step, each rank at its best learning rate, averaged over seeds."""
    best = _select_best_trials(records, decision)
    finished = records.by_id
    metric = records.started.points_metric or records.started.metric
    base = next((trial.metrics.get(metric) for trial in finished.values() if trial.rank == 0), None)
    series: list[Series] = []
    rows: list[tuple[int, int, float, float | None]] = []
    for tone, (rank, trials) in enumerate(best.items()):
        curves = [_collect_held_out_values(trial, finished, metric) for trial in trials]
        # The mean training loss since the previous evaluation, averaged over the trials.
        losses = [(p.step, p.train_value) for trial in trials for p in trial.points if p.train_value is not None]
        training_losses = {
            at: fmean(value for step, value in losses if step == at) for at in sorted({at for at, _ in losses})
        }
        shared_steps = sorted(set.intersection(*map(set, curves)))
        held_out = {step: fmean(curve[step] for curve in curves) for step in shared_steps}
        rows += [(rank, step, value, training_losses.get(step)) for step, value in held_out.items()]
        if held_out and min(held_out) > 0 and base is not None:  # At step 0 the adapter does not change the base model.
            held_out = {0: base, **held_out}
        if held_out:
            series.append(Series(f"rank {rank}", tuple(held_out), tuple(held_out.values()), tone=tone))
        if len(training_losses) > 1 and metric == "loss":  # A line needs two values.
            x, y = tuple(training_losses), tuple(training_losses.values())
            series.append(Series(f"rank {rank}", x, y, kind="line", dashed=True, tone=tone))
    if not series:
        return None
    begin = FIRST_SHOWN * max(curve.x[-1] for curve in series)
    late = [value for curve in series for step, value in zip(curve.x, curve.y, strict=True) if step >= begin]
    room = 0.06 * ((max(late) - min(late)) or abs(late[0]) or 1.0)
    means = {rank: fmean(t.metrics.get(metric, t.value) for t in trials) for rank, trials in best.items()}
    end_values = ", ".join(f"rank {rank} {mean:.4g}" for rank, mean in means.items())
    return Figure(
        name="learning_curves",
        title=f"Learning curves{' (training dashed)' if any(curve.dashed for curve in series) else ''}",
        alt=f"Held-out {metric} by step, each rank at its best learning rate. At the end: {end_values}.",
        x=Axis("step"),
        y=build_metric_axis(metric, metric_direction(records.started, metric), (min(late) - room, max(late) + room)),
        series=tuple(series),
        columns=("rank", "step", "held-out", "training"),
        rows=tuple(rows),
    )


def _collect_held_out_values(
    trial: TrialFinished, finished: Mapping[str, TrialFinished], metric: str
) -> dict[int, float]:
    """Map steps to held-out values of the training, including the evaluations of the stages that it was resumed from."""
    values = {point.step: point.value for point in trial.points}
    stage = finished.get(trial.continue_from or "")
    while stage is not None:
        if stage.stop_at is not None and metric in stage.metrics:
            values.setdefault(stage.stop_at, stage.metrics[metric])
        stage = finished.get(stage.continue_from or "")
    return values


SERIES: dict[str, tuple[str, Tone]] = {
    "trained": ("trained at that rank", "main"),
    "truncated": ("truncated from the highest rank", "second"),
}
# Adapters that are worse than the reference by more margins are off the scale, so that the margin stays readable.
MAX_MARGINS = 6.0


def build_adapter_figure(records: Records) -> Figure | None:
    """Plot held-out values by rank of trained and truncated adapters; return None before the first answer."""
    if not records.adapters:
        return None
    answer = records.adapters[-1].answer
    started = records.started
    return build_comparison_figure(answer, compared(records), started.metric, started.higher_is_better)


def build_comparison_figure(
    answer: AdapterAnswer, adapters: Sequence[AdapterCandidate], metric: str, higher_is_better: bool
) -> Figure:
    """Plot adapters that were compared with the answer's reference.

    A whisker spans the 95% bounds of the paired difference, starting from the reference's value. An adapter is good enough if its
    whisker ends inside the band.
    """
    sign = -1 if higher_is_better else 1
    reference = next(adapter.value - sign * adapter.difference for adapter in adapters)
    edge = reference + sign * answer.margin
    visible_adapters = [adapter for adapter in adapters if adapter.difference <= MAX_MARGINS * answer.margin]
    ends = [reference + sign * end for adapter in visible_adapters for end in _get_bounds(adapter)] + [edge, reference]
    room = 0.06 * (max(ends) - min(ends) or 1.0)
    chosen_adapter = next(adapter for adapter in adapters if adapter.trial_id == answer.trial_id)
    off_scale_ranks = sorted({adapter.rank for adapter in adapters} - {adapter.rank for adapter in visible_adapters})
    off_scale_text = f" (off the scale: rank {', '.join(map(str, off_scale_ranks))})" if off_scale_ranks else ""
    return Figure(
        name="adapters",
        title=f"Trained and truncated adapters by rank{off_scale_text}",
        alt=f"Held-out {metric} by LoRA rank. "
        + " ".join(f"Rank {adapter.rank}, {adapter.method}: worse by {adapter.difference:.2g}." for adapter in adapters)
        + f" {answer.sentence}",
        x=build_rank_axis([adapter.rank for adapter in adapters]),
        y=build_metric_axis(metric, higher_is_better, (min(ends) - room, max(ends) + room)),
        series=tuple(
            _build_adapter_series(how, adapters, reference, sign)
            for how in SERIES
            if any(a.method == how for a in adapters)
        ),
        bands=(Band("within the margin; whiskers: paired 95% bounds", min(reference, edge), max(reference, edge)),),
        marks=(
            Mark(
                f"exported: rank {chosen_adapter.rank}, {chosen_adapter.method}",
                chosen_adapter.rank,
                chosen_adapter.value,
            ),
        ),
        columns=("rank", "how", "value", "difference", "lower bound", "upper bound", "holds"),
        rows=tuple(
            (
                file.rank,
                file.method,
                file.value,
                file.difference,
                file.difference_low,
                file.difference_high,
                ENOUGH[file.is_within_margin],
            )
            for file in adapters
        ),
    )


def _build_adapter_series(how: str, adapters: Sequence[AdapterCandidate], reference: float, sign: int) -> Series:
    series_adapters = sorted(
        (adapter for adapter in adapters if adapter.method == how), key=lambda adapter: adapter.rank
    )
    ends = [sorted(reference + sign * end for end in _get_bounds(adapter)) for adapter in series_adapters]
    label, tone = SERIES[how]
    return Series(
        label,
        tuple(adapter.rank for adapter in series_adapters),
        tuple(adapter.value for adapter in series_adapters),
        tuple(min(adapter.value, low) for adapter, (low, _) in zip(series_adapters, ends, strict=True)),
        tuple(max(adapter.value, high) for adapter, (_, high) in zip(series_adapters, ends, strict=True)),
        dashed=how != "trained",
        tone=tone,
    )


def _get_bounds(adapter: AdapterCandidate) -> tuple[float, float]:
    """Return the bounds of the difference, or the difference itself if it has no bounds."""
    low = adapter.difference if adapter.difference_low is None else adapter.difference_low
    return low, adapter.difference if adapter.difference_high is None else adapter.difference_high
