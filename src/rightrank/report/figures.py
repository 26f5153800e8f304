"""The figures of a run, computed from its records by pure functions: ranks, adapters, learning, memory and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import log2
from statistics import fmean

from rightrank.decision.records import Records, compared, metric_direction
from rightrank.report.evidence_tables import ENOUGH, coverage, metric_unit
from rightrank.report.figure import (
    Axis,
    Band,
    Figure,
    Level,
    Mark,
    Series,
    Tone,
    axis_from_zero,
    log_ticks,
    metric_axis,
    rank_axis,
)
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate, Decision, RankEvidence
from rightrank.schema.trials import TrialFinished


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
    levels: list[Level] = []
    if base is not None:  # off the scale it is drawn at the edge, and labelled so
        room = 0.01 * (limits[1] - limits[0])
        inside = min(max(base, limits[0] + room), limits[1] - room)
        off = "" if limits[0] <= base <= limits[1] else " (off the scale)"
        levels.append(Level(f"base, no adapter: {base:.4g}{off}", inside if off else base))
    values = ", ".join(f"rank {e.rank} {e.value:.4f}" for e in trained)
    return Figure(
        name="rank_curve",
        title="Performance against rank",
        alt=f"Held-out {decision.metric} against LoRA rank: {values}"
        + (f"; base without an adapter {base:.4f}" if base is not None else "")
        + f". {decision.sentence}",
        x=rank_axis(ranks),
        y=metric_axis(decision.metric, decision.higher_is_better, limits),
        series=(points,),
        bands=(band,),
        levels=tuple(levels),
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


def _diminishing_rank(decision: Decision) -> int | None:
    """The smallest rank from which no measured doubling gains more than the margin; None if the last one still does.

    It depends on the margin and on the ranks tried.
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


def _marks(decision: Decision, trained: list[RankEvidence]) -> list[Mark]:
    values = {e.rank: e.value for e in trained}
    marks: list[Mark] = []
    diminishing = _diminishing_rank(decision)
    if diminishing is not None:
        marks.append(Mark("doubling gains less than the margin", diminishing, values[diminishing], "second"))
    chosen = decision.rank_at_hand
    refused = any(e.rank == chosen and e.non_inferior is False for e in trained)
    if chosen in values and not refused:
        fallback = "shown to be enough so far" if decision.fallback_rank is not None else "best so far"
        label = "chosen" if decision.rank is not None else fallback
        marks.append(Mark(f"{label}: rank {chosen}", chosen, values[chosen]))
    return marks


MIB = 2**20


def figures_of(records: Records, decision: Decision | None) -> list[Figure]:
    """Every figure that the records support, the rank curve first."""
    figures: list[Figure | None] = []
    if decision is not None:
        figures += [rank_figure(decision), _staircase_figure(decision)]
    figures += [
        _learning_figure(records, decision),
        adapter_figure(records),
        _memory_figure(records),
        _time_figure(records),
    ]
    return [figure for figure in figures if figure is not None]


def margin_steps(decision: Decision) -> list[tuple[float, int]]:
    """`(margin, rank)`: the rank that is enough from this margin on. The first margin is 0."""
    steps = [(step.margin, step.rank) for step in decision.staircase]
    return steps if steps and steps[0][0] == 0 else [(0.0, decision.reference_rank), *steps]


def _rank_at(steps: Sequence[tuple[float, int]], margin: float) -> int:
    """The rank that is enough at a margin."""
    return next(rank for needed, rank in reversed(steps) if needed <= margin)


def _staircase_figure(decision: Decision) -> Figure:
    """Margin → rank as a staircase."""
    steps = margin_steps(decision)
    needed = [margin for margin, _ in steps if margin > 0]
    # From below the first step to above the one at which the smallest rank is enough.
    low, high = (
        min([decision.margin / 5, *(m / 2 for m in needed)]),
        max([decision.margin * 5, *(m * 2 for m in needed)]),
    )
    corners = [(low, _rank_at(steps, low))] + [step for step in steps if low < step[0] < high]
    corners.append((high, _rank_at(steps, high)))
    ranks = sorted({rank for _, rank in corners})
    steps_text = "; ".join(f"from {needed:.2g} on, rank {rank}" for needed, rank in corners[1:-1])
    return Figure(
        name="staircase",
        title="Which rank is enough at which margin",
        alt=f"Staircase of the smallest rank whose bound is within the margin. At a margin of {low:.2g}, rank {corners[0][1]}"
        + (f"; {steps_text}." if steps_text else " at every margin shown."),
        x=Axis(f"margin, {metric_unit(decision.metric)}", "log10", log_ticks(low, high), (low, high)),
        y=Axis("smallest rank enough", "log2", tuple(ranks)),
        series=(
            Series("enough", tuple(c[0] for c in corners), tuple(c[1] for c in corners), kind="step", tone="main"),
        ),
        marks=(Mark("this margin", decision.margin, _rank_at(steps, decision.margin)),),
        columns=("margin from", "rank"),
        rows=tuple(steps),
    )


def _memory_figure(records: Records) -> Figure | None:
    """Peak memory by rank: measured, and planned for the same trainings.

    On a CPU, the measured peak is of the whole process and the planned one of the tensors: like is drawn with like, so the
    plan is among the numbers alone.
    """
    trained = _by_rank([trial for trial in records.finished() if trial.steps > 0 and trial.peak_bytes > 0])
    highest = {rank: max(trials, key=lambda t: t.peak_bytes) for rank, trials in trained.items() if rank > 0}
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
    alt = f"Peak memory by rank: {_listed(peaks, 'MiB')}."
    return _cost_figure("memory", title, alt, "peak memory, MiB", series, columns)


def _time_figure(records: Records) -> Figure | None:
    """Mean seconds of training and of evaluation by rank."""
    groups = _by_rank([trial for trial in records.finished() if trial.rank > 0 and trial.arm.is_direct])
    if not any(trial.seconds for trials in groups.values() for trial in trials):  # a table may not say
        return None
    train = {rank: fmean(trial.train_seconds for trial in trials) for rank, trials in groups.items()}
    evaluation = {rank: fmean(trial.eval_seconds for trial in trials) for rank, trials in groups.items()}
    series = [
        Series("training", tuple(train), tuple(train.values())),
        Series("evaluation", tuple(evaluation), tuple(evaluation.values()), tone="second"),
    ]
    alt = f"Seconds per training by rank: {_listed(train, 's')}."
    columns = {"training seconds": train, "evaluation seconds": evaluation}
    return _cost_figure("time", "Time of a training", alt, "seconds", series, columns)


def _cost_figure(
    name: str, title: str, alt: str, label: str, series: Sequence[Series], columns: Mapping[str, Mapping[int, float]]
) -> Figure:
    """What a training costs by rank; `columns` are the figure's numbers, the first of them of every rank."""
    first, *_ = columns.values()
    values = [value for column in columns.values() for value in column.values()]
    rows = tuple((rank, *(column.get(rank) for column in columns.values())) for rank in first)
    return Figure(
        name=name,
        title=title,
        alt=alt,
        x=rank_axis(list(first)),
        y=axis_from_zero(label, values),
        series=tuple(series),
        columns=("rank", *columns),
        rows=rows,
    )


def _listed(values: Mapping[int, float], unit: str) -> str:
    texts = {rank: f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for rank, value in values.items()}
    return ", ".join(f"rank {rank} {text} {unit}" for rank, text in texts.items())


def _best_trials(records: Records, decision: Decision | None) -> dict[int, list[TrialFinished]]:
    """The trials of each rank at its best learning rate: those that the decision names, if there is one."""
    by_id = records.by_id
    if decision is not None:
        named = {e.rank: [by_id[i] for i in e.trial_ids if i in by_id] for e in decision.ranks if e.rank > 0}
        return {rank: trials for rank, trials in named.items() if trials}
    groups = _by_rank([trial for trial in by_id.values() if trial.rank > 0 and trial.arm.is_direct])
    sign = -1 if records.started.higher_is_better else 1
    return {rank: [min(trials, key=lambda trial: sign * trial.value)] for rank, trials in groups.items()}


def _by_rank(trials: Sequence[TrialFinished]) -> dict[int, list[TrialFinished]]:
    """The trials of each rank, ranks ascending."""
    ranks = sorted({trial.rank for trial in trials})
    return {rank: [trial for trial in trials if trial.rank == rank] for rank in ranks}


FIRST_SHOWN = 0.1  # of the steps: what falls before may be off the scale, or the end would be a flat line


def _learning_figure(records: Records, decision: Decision | None) -> Figure | None:
    """Held-out values and the training loss by step: each rank at its best learning rate, means over seeds."""
    best = _best_trials(records, decision)
    finished = records.by_id
    metric = records.started.points_metric or records.started.metric
    base = next((trial.metrics.get(metric) for trial in finished.values() if trial.rank == 0), None)
    series: list[Series] = []
    rows: list[tuple[int, int, float, float | None]] = []
    for place, (rank, trials) in enumerate(best.items()):
        curves = [_held_out(trial, finished, metric) for trial in trials]
        # The mean training loss since the evaluation before, mean over the trials.
        losses = [(p.step, p.train_value) for trial in trials for p in trial.points if p.train_value is not None]
        before = {at: fmean(value for step, value in losses if step == at) for at in sorted({at for at, _ in losses})}
        shared = sorted(set.intersection(*map(set, curves)))
        held = {step: fmean(curve[step] for curve in curves) for step in shared}
        rows += [(rank, step, value, before.get(step)) for step, value in held.items()]
        if held and min(held) > 0 and base is not None:  # at step 0 the adapter is the base model
            held = {0: base, **held}
        if held:
            series.append(Series(f"rank {rank}", tuple(held), tuple(held.values()), tone=place))
        if len(before) > 1 and metric == "loss":  # one value is no line
            x, y = tuple(before), tuple(before.values())
            series.append(Series(f"rank {rank}", x, y, kind="line", dashed=True, tone=place))
    if not series:
        return None
    begin = FIRST_SHOWN * max(curve.x[-1] for curve in series)
    late = [value for curve in series for step, value in zip(curve.x, curve.y, strict=True) if step >= begin]
    room = 0.06 * ((max(late) - min(late)) or abs(late[0]) or 1.0)
    means = {rank: fmean(t.metrics.get(metric, t.value) for t in trials) for rank, trials in best.items()}
    ends = ", ".join(f"rank {rank} {mean:.4g}" for rank, mean in means.items())
    return Figure(
        name="learning_curves",
        title=f"Learning curves{' (training dashed)' if any(curve.dashed for curve in series) else ''}",
        alt=f"Held-out {metric} by step, each rank at its best learning rate. At the end: {ends}.",
        x=Axis("step"),
        y=metric_axis(metric, metric_direction(records.started, metric), (min(late) - room, max(late) + room)),
        series=tuple(series),
        columns=("rank", "step", "held-out", "training"),
        rows=tuple(rows),
    )


def _held_out(trial: TrialFinished, finished: Mapping[str, TrialFinished], metric: str) -> dict[int, float]:
    """Step → held-out value of the training, with those at which it had been stopped before it was resumed."""
    values = {point.step: point.value for point in trial.points}
    stage = finished.get(trial.continue_from or "")
    while stage is not None:
        if stage.stop_at is not None and metric in stage.metrics:
            values.setdefault(stage.stop_at, stage.metrics[metric])
        stage = finished.get(stage.continue_from or "")
    return values


SERIES: dict[str, tuple[str, Tone]] = {
    "trained": ("trained at that rank", "main"),
    "truncated": ("truncated from the top rank", "second"),
}
MAX_MARGINS = 6.0  # worse than the reference by more: off the scale, so that the margin stays readable


def adapter_figure(records: Records) -> Figure | None:
    """Held-out value by rank of trained and truncated adapters; None before the first answer."""
    if not records.adapters:
        return None
    answer = records.adapters[-1].answer
    started = records.started
    return figure_of(answer, compared(records), started.metric, started.higher_is_better)


def figure_of(
    answer: AdapterAnswer, adapters: Sequence[AdapterCandidate], metric: str, higher_is_better: bool
) -> Figure:
    """The figure of `adapters`, which are compared with the answer's reference.

    A whisker spans the 95% bounds of the paired difference, from the reference's value. An adapter holds if its whisker ends
    inside the band.
    """
    sign = -1 if higher_is_better else 1
    reference = next(adapter.value - sign * adapter.difference for adapter in adapters)
    edge = reference + sign * answer.margin
    shown = [adapter for adapter in adapters if adapter.difference <= MAX_MARGINS * answer.margin]
    ends = [reference + sign * end for adapter in shown for end in _ends(adapter)] + [edge, reference]
    room = 0.06 * (max(ends) - min(ends) or 1.0)
    chosen = next(adapter for adapter in adapters if adapter.trial_id == answer.trial_id)
    off = sorted({adapter.rank for adapter in adapters} - {adapter.rank for adapter in shown})
    off_text = f" (off the scale: rank {', '.join(map(str, off))})" if off else ""
    return Figure(
        name="adapters",
        title=f"Trained and truncated adapters by rank{off_text}",
        alt=f"Held-out {metric} by LoRA rank. "
        + " ".join(f"Rank {adapter.rank}, {adapter.how}: worse by {adapter.difference:.2g}." for adapter in adapters)
        + f" {answer.sentence}",
        x=rank_axis([adapter.rank for adapter in adapters]),
        y=metric_axis(metric, higher_is_better, (min(ends) - room, max(ends) + room)),
        series=tuple(
            _adapter_series(how, adapters, reference, sign) for how in SERIES if any(a.how == how for a in adapters)
        ),
        bands=(Band("within the margin; whiskers: paired 95% bounds", min(reference, edge), max(reference, edge)),),
        marks=(Mark(f"handed over: rank {chosen.rank}, {chosen.how}", chosen.rank, chosen.value),),
        columns=("rank", "how", "value", "difference", "lower bound", "upper bound", "holds"),
        rows=tuple(
            (
                file.rank,
                file.how,
                file.value,
                file.difference,
                file.difference_low,
                file.difference_high,
                ENOUGH[file.holds],
            )
            for file in adapters
        ),
    )


def _adapter_series(how: str, adapters: Sequence[AdapterCandidate], reference: float, sign: int) -> Series:
    own = sorted((adapter for adapter in adapters if adapter.how == how), key=lambda adapter: adapter.rank)
    ends = [sorted(reference + sign * end for end in _ends(adapter)) for adapter in own]
    label, tone = SERIES[how]
    return Series(
        label,
        tuple(adapter.rank for adapter in own),
        tuple(adapter.value for adapter in own),
        tuple(min(adapter.value, low) for adapter, (low, _) in zip(own, ends, strict=True)),
        tuple(max(adapter.value, high) for adapter, (_, high) in zip(own, ends, strict=True)),
        dashed=how != "trained",
        tone=tone,
    )


def _ends(adapter: AdapterCandidate) -> tuple[float, float]:
    """The bounds of the difference; the difference itself where there are none."""
    low = adapter.difference if adapter.difference_low is None else adapter.difference_low
    return low, adapter.difference if adapter.difference_high is None else adapter.difference_high
