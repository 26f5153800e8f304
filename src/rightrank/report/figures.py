"""Figures of ranks, adapters, learning rates and learning curves: numbers as a table, and a function that draws them on matplotlib axes.

Matplotlib is imported when a figure is drawn. Without it, a figure still has its numbers.
"""

from __future__ import annotations

import csv
import re
import warnings
from base64 import b64encode
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any, TypeAlias

from rightrank.data.files import write_text
from rightrank.decision.adapter import is_shown_enough
from rightrank.report.format import ENOUGH, format_bound_label, format_metric_label, make_visible
from rightrank.schema.errors import MissingExtraError
from rightrank.schema.events import Records, RunStarted
from rightrank.schema.results import (
    AdapterAnswer,
    AdapterCandidate,
    Decision,
    LearningRateAnswer,
    LearningRateCandidate,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas


TableCell: TypeAlias = str | float | int | None
INSTALL_HINT = "figures need matplotlib; install it with: pip install 'rightrank[plots]'"
WIDTH, HEIGHT, LEGEND_ROW_HEIGHT = 5.0, 3.4, 0.21  # inches
TITLE_WIDTH, LABEL_WIDTH, LEGEND_WIDTH = 44, 38, 58  # characters
MAX_TICKS = 10  # of a logarithmic axis
RANK = "LoRA rank"  # the label of an axis
Interval: TypeAlias = tuple[float, float, float, float]  # x, the value, and both ends of its whisker
# The colours of a drawing on a light page, which files have, and on a dark one: those of the style sheet.
LIGHT = {
    "paper": "#ffffff", "ink": "#1d2b34", "faint": "#5b6b74", "line": "#d6dde1", "s0": "#1c5d7f", "s1": "#c2571a", "s2": "#21756b",
    "s3": "#8e3b8a", "s4": "#7a6a00", "s5": "#b3344f", "s6": "#2f6fb0", "s7": "#5c7f1e", "s8": "#6a4c93", "s9": "#444444",
}  # fmt: skip
DARK = {
    "paper": "#12181b", "ink": "#e7eef1", "faint": "#a4b4bc", "line": "#37444a", "s0": "#6cb8e0", "s1": "#f0935a", "s2": "#5fc4b6",
    "s3": "#d58ad1", "s4": "#d1be4a", "s5": "#f08aa0", "s6": "#77b4f0", "s7": "#a6cc5f", "s8": "#b79be0", "s9": "#c0c0c0",
}  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "font.size": 11, "savefig.facecolor": "auto", "axes.facecolor": "none", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "axes.titlelocation": "left",
    "axes.titlesize": 12, "axes.titleweight": "bold", "axes.formatter.useoffset": False, "legend.frameon": False, "legend.fontsize": 10,
}  # fmt: skip
COLOURED = {
    "paper": ("figure.facecolor",), "line": ("grid.color",), "ink": ("text.color", "axes.titlecolor", "axes.labelcolor"),
    "faint": ("axes.edgecolor", "xtick.color", "ytick.color"),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A plot and its numbers.

    `name` is its file name, `rows` are its numbers under the headings `columns`, and `draw` draws it on axes.
    """

    name: str
    title: str
    x_label: str
    y_label: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[TableCell, ...]]
    draw: Callable[[Axes], object]

    def plot(self, ax: Axes) -> Axes:
        """Draw the figure with its title, labels and legend; return the axes."""
        title, x_label, y_label = map(escape_label, (self.title, self.x_label, self.y_label))
        ax.set(title=fill(title, TITLE_WIDTH), xlabel=x_label, ylabel=fill(y_label, LABEL_WIDTH))
        self.draw(ax)
        if len(ax.get_legend_handles_labels()[1]) > 1:
            ax.legend()
        return ax

    @cached_property
    def svg(self) -> str:
        """Return the drawing as an SVG file, the same text for the same figure; empty if matplotlib is not installed."""
        if not is_matplotlib_installed():
            return ""
        drawing = StringIO()
        with self._open_canvas() as canvas:
            canvas.savefig(drawing, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        return drawing.getvalue()

    @property
    def images(self) -> tuple[str, str]:
        """Return the addresses of the drawing in the page, on a light and on a dark page."""
        dark = {LIGHT[name]: colour for name, colour in DARK.items()}
        return encode_image(self.svg), encode_image(re.sub("|".join(dark), lambda match: dark[match[0]], self.svg))

    @contextmanager
    def _open_canvas(self) -> Iterator[Canvas]:
        """Draw the figure in the style of the report, with its legend below the axes."""
        from matplotlib import rc_context, rcParamsDefault
        from matplotlib.figure import Figure as Canvas
        from matplotlib.rcsetup import cycler

        cycle = cycler(color=[LIGHT[f"s{number}"] for number in range(10)])
        coloured = {name: LIGHT[colour] for colour, names in COLOURED.items() for name in names}
        defaults = {name: value for name, value in rcParamsDefault.items() if not name.startswith("backend")}
        style: Any = {**defaults, **STYLE, **coloured, "axes.prop_cycle": cycle, "svg.hashsalt": self.name}
        with rc_context(style), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # The font that measures a text may lack some of its letters.
            canvas = Canvas(figsize=(WIDTH, HEIGHT), layout="constrained")
            ax = self.plot(canvas.subplots())
            if (legend := ax.get_legend()) is not None:
                legend.remove()
                handles, labels = ax.get_legend_handles_labels()
                columns = max(1, min(4, len(labels), LEGEND_WIDTH // (max(map(len, labels)) + 7)))
                canvas.legend(handles, labels, loc="outside lower left", ncols=columns)
                canvas.set_figheight(HEIGHT + LEGEND_ROW_HEIGHT * -(-len(labels) // columns))
            yield canvas


def encode_image(svg: str) -> str:
    """Return the address of an SVG drawing that is part of a page."""
    return f"data:image/svg+xml;base64,{b64encode(svg.encode()).decode()}"


def is_matplotlib_installed() -> bool:
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Raise if figures cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not is_matplotlib_installed():
        raise MissingExtraError(INSTALL_HINT)


def escape_label(text: str) -> str:
    """Return text that matplotlib shows as it is: names from data contain no mathematics."""
    return make_visible(text).replace("$", r"\$")


def write_figures(folder: Path, figures: Sequence[Figure]) -> None:
    """Write the numbers of each figure as `folder/<name>.csv`, and its drawing as SVG if matplotlib is installed."""
    for figure in figures:
        numbers = StringIO()
        csv.writer(numbers, lineterminator="\n").writerows([figure.columns, *figure.rows])
        write_text(folder / f"{figure.name}.csv", numbers.getvalue())
        if figure.svg:
            write_text(folder / f"{figure.name}.svg", figure.svg)


def compute_limits(values: Collection[float], base: float | None = None) -> tuple[float, float]:
    """Return the limits of the y axis.

    They include all of `values`, and also the base model unless that would compress the values into less than a third of the axis.
    """
    low, high = min(values), max(values)
    value_range = (high - low) or abs(high) or 1.0
    if base is not None and max(high, base) - min(low, base) <= 3 * value_range:
        low, high = min(low, base), max(high, base)
    padding = 0.08 * ((high - low) or value_range)
    return low - padding, high + padding


def draw_points(ax: Axes, points: Sequence[Interval], label: str, colour: str, line: str = "-") -> None:
    """Draw points with whiskers and a line through them. A whisker includes its point."""
    x, y, low, high = zip(*points, strict=True)
    lengths = [[max(0.0, p[1] - min(p[2:])) for p in points], [max(0.0, max(p[2:]) - p[1]) for p in points]]
    options: dict[str, Any] = {"markersize": 5, "capsize": 4, "elinewidth": 1, "label": escape_label(label)}
    ax.errorbar(x, y, lengths if low != high else None, fmt=f"o{line}", color=colour, **options)


def draw_band(ax: Axes, first: float, second: float, label: str) -> None:
    ax.axhspan(min(first, second), max(first, second), facecolor="C2", alpha=0.25, linewidth=0, label=label)


def draw_ring(ax: Axes, x: float, y: float, label: str) -> None:
    """Draw a ring below the points."""
    style: Any = {"markerfacecolor": "none", "markersize": 13, "markeredgewidth": 2, "zorder": 1.5}
    ax.plot([x], [y], "o", color="C5", label=escape_label(label), **style)


def draw_share_axis(ax: Axes, base: float | None, reference: float) -> None:
    """Draw the share of the gain on the right: 0% at the base's value, 100% at the reference's; nothing without a gain."""
    if base is None or base == reference:
        return
    slope = 100 / (reference - base)

    def convert_to_share(values: Any) -> Any:
        return (values - base) * slope

    def convert_to_value(shares: Any) -> Any:
        return base + shares / slope

    axis = ax.secondary_yaxis("right", functions=(convert_to_share, convert_to_value))
    axis.set_ylabel("share of the gain, %")


def set_log_ticks(ax: Axes, values: Collection[float]) -> None:
    """Make the x axis logarithmic, with a tick at each value. A value whose label would touch the previous one has no tick."""
    ticks: list[float] = []
    for value in sorted(set(values)):
        if not ticks or value / ticks[-1] >= 0.999 * (max(values) / min(values)) ** (1 / MAX_TICKS):
            ticks.append(value)
    if len(ticks) == 1:  # matplotlib widens a range without an extent with a warning
        ax.set_xlim(ticks[0] / 2, ticks[0] * 2)
    ax.set_xscale("log")
    ax.xaxis.set_ticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    ax.xaxis.set_ticks([], minor=True)


# Fraction of the steps whose values may be off the scale. Otherwise the end of the curve would look flat.
FIRST_SHOWN = 0.1
MAX_LABELLED_CURVES = 12


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
        bound = format_bound_label(decision.confidence)
        points = [(e.rank, e.value, e.value, end) for e, end in zip(trained, ends, strict=True)]
        draw_points(ax, points, f"best learning rate; whisker: paired {bound}", "C0")
        if base is not None:  # it may be off the scale
            ax.axhline(base, color="0.5", linestyle=":", label=f"base, no adapter: {base:.4g}")
        set_log_ticks(ax, [e.rank for e in trained])
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


def build_learning_figure(records: Records) -> Figure | None:
    """Plot held-out values and the training loss by step of the best training of each rank; None with fewer than two values each."""
    finished, started = records.by_id, records.started
    metric, sign = started.points_metric or started.metric, -1 if started.higher_is_better else 1
    base = next((trial.metrics.get(metric) for trial in finished.values() if trial.rank == 0), None)
    trainings = [trial for trial in finished.values() if trial.rank > 0 and trial.is_direct]
    held_out: dict[int, dict[int, float]] = {}
    training: dict[int, dict[int, float]] = {}
    for rank in sorted({trial.rank for trial in trainings}):
        best = min((trial for trial in trainings if trial.rank == rank), key=lambda trial: sign * trial.value)
        values = {0: base} if base is not None else {}  # At step 0 the adapter does not change the base model.
        stage = finished.get(best.continue_from or "")
        if stage is not None and metric in stage.metrics:
            values[stage.end] = stage.metrics[metric]
        values |= {point.step: point.value for point in best.points}
        if len(values) > 1:
            held_out[rank] = values
            # The mean training loss since the previous evaluation.
            training[rank] = {point.step: point.train_value for point in best.points if point.train_value is not None}
    if not held_out:
        return None
    drawn_training = training if metric == "loss" else {}

    def draw(ax: Axes) -> None:
        for number, (rank, values) in enumerate(held_out.items()):
            label = f"rank {rank}" if number < MAX_LABELLED_CURVES else None
            ax.plot([*values], [*values.values()], "o-", color=f"C{number % 10}", markersize=5, label=label)
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


def plot_learning_rates(answer: LearningRateAnswer, started: RunStarted) -> Figure | None:
    """Plot values against the learning rate at the step at which all were compared and at the end, and mark the chosen rate.

    A whisker spans the paired 90% interval of the difference from the chosen learning rate.

    Returns:
        None if only one learning rate has a value.
    """
    sign = -1 if started.higher_is_better else 1
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
    failed = ", ".join(f"{c.learning_rate:g}" for c in rates if c.value is None)

    def draw(ax: Axes) -> None:
        has_whiskers = any(low < high for _, _, low, high in points)
        label = f"after {answer.step} of {answer.steps} steps" if answer.step < answer.steps else "at the end"
        draw_points(ax, points, label + "; whiskers: paired 90% intervals" * has_whiskers, "C0")
        if answer.step < answer.steps and final_points:
            ax.plot(*zip(*final_points, strict=True), "s--", color="C1", label="at the end")
        ax.axvline(answer.learning_rate, color="0.5", linestyle=":", label=f"chosen: {answer.learning_rate:g}")
        set_log_ticks(ax, [rate for rate, *_ in points])

    return Figure(
        name="learning_rates",
        title=f"Learning rates at rank {answer.rank}" + (f" (no result: {failed})" if failed else ""),
        x_label="learning rate",
        y_label=format_metric_label(answer.metric, started.higher_is_better and is_same_metric),
        columns=("learning rate", "value", "difference", "lower bound", "upper bound", "value at the end"),
        rows=[
            (c.learning_rate, c.value, c.difference, c.difference_low, c.difference_high, c.final_value) for c in rates
        ],
        draw=draw,
    )


# Adapters that are worse than the reference by more margins are off the scale, so that the margin stays readable.
MAX_MARGINS = 6.0


METHODS = {"trained": "trained at that rank", "truncated": "truncated from the highest rank"}


def get_whisker_ends(
    value: float, compared: AdapterCandidate | LearningRateCandidate, sign: int
) -> tuple[float, float]:
    """Return the ends of a whisker: the value that the paired difference is from, plus the bounds of the difference."""
    difference, low, high = compared.difference, compared.difference_low, compared.difference_high
    if difference is None or low is None or high is None:
        return value, value
    ends = value + sign * (low - difference), value + sign * (high - difference)
    return min(ends), max(ends)


def plot_adapters(
    answer: AdapterAnswer,
    adapters: Sequence[AdapterCandidate],
    metric: str,
    higher_is_better: bool,
) -> Figure:
    """Plot held-out values by rank of trained and truncated adapters.

    A whisker spans the 90% interval of the paired difference, starting from the reference's value. An adapter is good enough if its
    whisker ends inside the band. The axis on the right has the share of the gain over the base.
    """
    sign = -1 if higher_is_better else 1
    reference = next(adapter.value - sign * adapter.difference for adapter in adapters)
    edge = reference + sign * answer.margin
    base = None if answer.gain is None or answer.has_no_gain else reference + sign * answer.gain.mean
    points = {a.trial_id: (a.rank, a.value, *get_whisker_ends(a.value, a, sign)) for a in adapters}
    visible = [adapter for adapter in adapters if adapter.difference <= MAX_MARGINS * answer.margin]
    off_scale_ranks = sorted({adapter.rank for adapter in adapters} - {adapter.rank for adapter in visible})
    off_scale_text = f" (off the scale: rank {', '.join(map(str, off_scale_ranks))})" if off_scale_ranks else ""
    chosen = next(adapter for adapter in adapters if adapter.trial_id == answer.trial_id)

    def draw(ax: Axes) -> None:
        draw_band(ax, reference, edge, "within the margin; whiskers: paired 90% intervals")
        draw_ring(ax, chosen.rank, chosen.value, f"exported: rank {chosen.rank}, {chosen.method}")
        for number, (method, label) in enumerate(METHODS.items()):
            series = sorted(points[adapter.trial_id] for adapter in adapters if adapter.method == method)
            if series:
                draw_points(ax, series, label, f"C{number}", "-" if method == "trained" else "--")
        set_log_ticks(ax, [adapter.rank for adapter in adapters])
        ax.set_ylim(*compute_limits([reference, edge, *(v for a in visible for v in points[a.trial_id][1:])]))
        draw_share_axis(ax, base, reference)

    return Figure(
        name="adapters",
        title=f"Adapters by rank{off_scale_text}",
        x_label=RANK,
        y_label=format_metric_label(metric, higher_is_better),
        columns=("rank", "method", "value", "difference", "lower bound", "upper bound", "holds"),
        rows=[
            (
                a.rank,
                a.method,
                a.value,
                a.difference,
                a.difference_low,
                a.difference_high,
                ENOUGH[is_shown_enough(a, answer)],
            )
            for a in adapters
        ],
        draw=draw,
    )
