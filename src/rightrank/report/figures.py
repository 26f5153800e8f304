"""Figures of a run, computed from its records: ranks, adapters, learning rates, learning curves and spectrum. None has a single point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import TYPE_CHECKING

from rightrank.decision.run import build_criterion, compare_run_adapters, describe_learning_rate
from rightrank.report.adapter_page import get_whisker_ends, plot_adapters
from rightrank.report.answer import format_interval_label
from rightrank.report.figure import (
    RANK,
    Figure,
    compute_limits,
    draw_band,
    draw_points,
    draw_ring,
    draw_share_axis,
    set_log_ticks,
)
from rightrank.report.format import format_metric_label
from rightrank.schema.decision import Decision
from rightrank.schema.events import Records
from rightrank.schema.trials import TrialFinished

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from rightrank.schema.results import Inspection

# Fraction of the steps whose values may be off the scale. Otherwise the end of the curve would look flat.
FIRST_SHOWN = 0.1
MAX_LABELLED_CURVES = 12


def build_figures(records: Records, decision: Decision | None) -> list[Figure]:
    """Build every figure that the records support, the rank curve first."""
    figures = [
        None if decision is None else build_rank_figure(decision),
        build_adapter_figure(records),
        build_learning_rate_figure(records),
        build_learning_figure(records, decision),
    ]
    return [figure for figure in figures if figure is not None]


def build_rank_figure(decision: Decision) -> Figure:
    """Plot each rank at its best learning rate, with the tested bound, the margin band, the base model and the chosen rank.

    The whisker of a rank ends at the reference's value plus the upper bound of the paired difference, so a rank is
    enough if its whisker ends inside the band. The interval of a single value is many times wider, because all ranks
    share the held-out examples; it is listed in the figure's rows.
    """
    trained = [evidence for evidence in decision.ranks if evidence.rank > 0]
    base = next((evidence.value for evidence in decision.ranks if evidence.rank == 0), None)
    sign = -1 if decision.higher_is_better else 1
    reference = next(evidence.value for evidence in trained if evidence.rank == decision.reference_rank)
    ends = [e.value if e.difference_high is None else reference + sign * e.difference_high for e in trained]
    edge = reference + sign * decision.margin
    limits = compute_limits([*(e.value for e in trained), *ends, reference, edge], base)

    def draw(ax: Axes) -> None:
        draw_band(ax, reference, edge, "within the margin of the best")
        for e in trained:
            if e.rank == decision.recommended_rank:
                label = "chosen" if decision.rank is not None else "to use until it is settled"
                draw_ring(ax, e.rank, e.value, f"{label}: rank {e.rank}")
        bound = format_interval_label(decision, "bound")
        points = [(e.rank, e.value, e.value, end) for e, end in zip(trained, ends, strict=True)]
        draw_points(ax, points, f"best learning rate; whisker: paired {bound}", "C0")
        if base is not None:  # A base value off the scale is drawn at the edge and labelled.
            visible_value = min(max(base, limits[0]), limits[1])
            off_scale_text = "" if visible_value == base else " (off the scale)"
            label = f"base, no adapter: {base:.4g}{off_scale_text}"
            ax.axhline(visible_value, color="0.5", linestyle=":", label=label)
        set_log_ticks(ax, "x", [e.rank for e in trained])
        ax.set_ylim(*limits)
        draw_share_axis(ax, base, reference)

    return Figure(
        name="rank_curve",
        title="Performance against rank",
        x_label=RANK,
        y_label=format_metric_label(decision.metric, decision.higher_is_better),
        columns=("rank", "value", "low", "high", "paired bound"),
        rows=[(e.rank, e.value, e.low, e.high, e.difference_high) for e in decision.ranks],
        draw=draw,
    )


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


def build_learning_figure(records: Records, decision: Decision | None) -> Figure | None:
    """Plot held-out values and the training loss by step, each rank at its best learning rate, averaged over seeds."""
    finished, started = records.by_id, records.started
    metric = started.points_metric or started.metric
    base = next((trial.metrics.get(metric) for trial in finished.values() if trial.rank == 0), None)
    held_out: dict[int, dict[int, float]] = {}
    training: dict[int, dict[int, float]] = {}
    for rank, trials in _select_best_trials(records, decision).items():
        held_out[rank] = _average([_collect_held_out_values(trial, finished, metric) for trial in trials])
        # The mean training loss since the previous evaluation.
        training[rank] = _average(
            [{p.step: p.train_value for p in t.points if p.train_value is not None} for t in trials]
        )
    held_out = {rank: values for rank, values in held_out.items() if values}
    longest = max((len(values) + (base is not None and min(values) > 0) for values in held_out.values()), default=0)
    if longest < 2:
        return None
    # A line needs two values.
    drawn_training = {r: values for r, values in training.items() if len(values) > 1 and metric == "loss"}

    def draw(ax: Axes) -> None:
        for number, (rank, values) in enumerate(held_out.items()):
            # At step 0 the adapter does not change the base model.
            curve = values if base is None or min(values) == 0 else {0: base, **values}
            label = f"rank {rank}" if number < MAX_LABELLED_CURVES else None
            ax.plot([*curve], [*curve.values()], "o-", color=f"C{number % 10}", markersize=5, label=label)
            losses = drawn_training.get(rank, {})
            ax.plot([*losses], [*losses.values()], "--", color=f"C{number % 10}", linewidth=1)
        begin = FIRST_SHOWN * max(step for values in held_out.values() for step in values)
        curves = [*held_out.values(), *drawn_training.values()]
        ax.set_ylim(*compute_limits([value for c in curves for step, value in c.items() if step >= begin]))

    return Figure(
        name="learning_curves",
        title=f"Learning curves{' (training dashed)' if drawn_training else ''}",
        x_label="step",
        y_label=format_metric_label(metric, started.get_metric_direction(metric)),
        columns=("rank", "step", "held-out", "training"),
        rows=[(r, step, v, training[r].get(step)) for r, values in held_out.items() for step, v in values.items()],
        draw=draw,
    )


def _average(curves: Sequence[Mapping[int, float]]) -> dict[int, float]:
    """Average curves at the steps that all of them have."""
    shared_steps = sorted(set.intersection(*map(set, curves)))
    return {step: fmean(curve[step] for curve in curves) for step in shared_steps}


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


def build_learning_rate_figure(records: Records) -> Figure | None:
    """Plot values against the learning rate at the step at which all were compared and at the end, and mark the chosen rate.

    They are those of the training that the adapter comes from or, while there is no adapter, of the best one at the largest rank. A
    whisker spans the paired 95% bounds of the difference from the chosen learning rate.

    Returns:
        None if only one learning rate was tried, or has a value.
    """
    started = records.started
    finished = [trial for trial in records.list_finished() if trial.arm.is_direct and trial.learning_rate > 0]
    trained_id = records.adapters[-1].answer.trained_id if records.adapters else None
    sign = -1 if started.higher_is_better else 1
    trained = min(finished, key=lambda t: (t.trial_id != trained_id, -t.rank, sign * t.value), default=None)
    answer = trained and describe_learning_rate(trained, records.outcomes, build_criterion(records))
    if not answer:
        return None
    rates = answer.candidates
    is_same_metric = answer.metric == started.metric
    points = [
        (c.learning_rate, c.value, *get_whisker_ends(c.value, c, sign if is_same_metric else 1))
        for c in rates
        if c.value is not None
    ]
    if len(points) < 2:
        return None
    final_points = [(c.learning_rate, c.final_value) for c in rates if c.final_value is not None and is_same_metric]
    current_points = [(c.learning_rate, c.current_value) for c in rates if c.current_value is not None]
    failed = ", ".join(f"{c.learning_rate:g}" for c in rates if c.value is None)

    def draw(ax: Axes) -> None:
        has_whiskers = any(low < high for _, _, low, high in points)
        label = f"after {answer.step} of {answer.steps} steps" if answer.step < answer.steps else "at the end"
        if current_points:
            ax.plot(*zip(*current_points, strict=True), "o:", color="0.6", label=f"{label}, current factors")
            label = "mean of the last factors"  # a longer label would be cut off
        draw_points(ax, points, label + "; whiskers: paired 95% bounds" * has_whiskers, "C0")
        if answer.step < answer.steps and final_points:
            ax.plot(*zip(*final_points, strict=True), "s--", color="C1", label="at the end")
        ax.axvline(answer.learning_rate, color="0.5", linestyle=":", label=f"chosen: {answer.learning_rate:g}")
        set_log_ticks(ax, "x", [rate for rate, *_ in points])

    return Figure(
        name="learning_rates",
        title=f"Learning rates at rank {answer.rank}" + (f" (no result: {failed})" if failed else ""),
        x_label="learning rate",
        y_label=format_metric_label(answer.metric, started.higher_is_better and is_same_metric),
        columns=(
            *("learning rate", "value", "with the current factors", "difference", "lower bound", "upper bound"),
            "value at the end",
        ),
        rows=[
            (
                *(c.learning_rate, c.value, c.current_value, c.difference, c.difference_low, c.difference_high),
                c.final_value,
            )
            for c in rates
        ],
        draw=draw,
    )


def build_adapter_figure(records: Records) -> Figure | None:
    """Plot the adapters of a run by rank; return None with fewer than two adapters, or before the first answer."""
    adapters = compare_run_adapters(records) if records.adapters else []
    if len(adapters) < 2:
        return None
    started = records.started
    return plot_adapters(records.adapters[-1].answer, adapters, started.metric, started.higher_is_better)


def build_spectrum_figure(inspection: Inspection) -> Figure | None:
    """Plot the median of the singular values over the modules, in descending order, with the smallest and the largest."""
    spectra = [module.singular_values for module in inspection.modules if any(v > 0 for v in module.singular_values)]
    if max(map(len, spectra), default=0) < 2:
        return None
    columns = [[s[k] for s in spectra if k < len(s) and s[k] > 0] for k in range(max(map(len, spectra)))]
    rows = [(k, median(v), min(v), max(v), len(v)) for k, v in enumerate(columns, 1) if v]

    def draw(ax: Axes) -> None:
        from matplotlib.ticker import LogLocator, MaxNLocator, StrMethodFormatter

        numbers, medians, smallest, largest, _ = zip(*rows, strict=True)
        ax.plot(numbers, medians, "o-", color="C0", markersize=4, label="median module")
        ax.fill_between(numbers, smallest, largest, color="C0", alpha=0.2, linewidth=0, label="smallest to largest")
        ax.set_yscale("log")
        is_narrow = max(largest) / min(smallest) < 1000
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if is_narrow else (1,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.set_yticks([], minor=True)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))

    return Figure(
        name="spectrum",
        title=f"Singular values of the adapter, {len(spectra)} modules",
        x_label="singular value, largest first",
        y_label="size",
        columns=("number", "median", "smallest", "largest", "modules"),
        rows=rows,
        draw=draw,
    )
