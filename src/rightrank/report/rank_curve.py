"""The performance-against-rank curve as plain data, and its drawings: SVG, PNG, and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import Any

from rightrank.records import Decision


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One rank at its best learning rate, with its 95% interval."""

    rank: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class RankCurve:
    """Everything that the plot shows."""

    points: tuple[CurvePoint, ...]
    base_value: float | None  # the base without an adapter: a line
    band_low: float  # values inside the margin of the reference
    band_high: float
    chosen_rank: int | None
    reference_rank: int
    metric: str
    title: str


def rank_curve(decision: Decision) -> RankCurve:
    """The plot's data from a decision."""
    trained = [evidence for evidence in decision.ranks if evidence.rank > 0]
    base = next((evidence.value for evidence in decision.ranks if evidence.rank == 0), None)
    reference = next(evidence for evidence in trained if evidence.rank == decision.reference_rank)
    other_side = reference.value + (-decision.margin if decision.higher_is_better else decision.margin)
    return RankCurve(
        points=tuple(CurvePoint(e.rank, e.value, e.low, e.high) for e in trained),
        base_value=base,
        band_low=min(reference.value, other_side),
        band_high=max(reference.value, other_side),
        chosen_rank=decision.rank,
        reference_rank=decision.reference_rank,
        metric=decision.metric,
        title=decision.sentence,
    )


def draw(curve: RankCurve, image_format: str) -> bytes:
    """The plot as `svg` or `png` bytes; the same curve gives the same bytes."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style: Any = {"svg.hashsalt": "rightrank", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(7.2, 4.4), layout="constrained")
        _draw_axes(figure.add_subplot(), curve)
        buffer = BytesIO()
        metadata = {"Date": None} if image_format == "svg" else {"Software": None}
        figure.savefig(buffer, format=image_format, dpi=144, metadata=metadata)
    return buffer.getvalue()


def _draw_axes(axes: Any, curve: RankCurve) -> None:
    ranks = [point.rank for point in curve.points]
    values = [point.value for point in curve.points]
    # Every rank shares its items, so one interval says how far the whole curve may shift; differences between
    # ranks are known far better than that (they are paired), which is why the intervals are drawn faint.
    below = [point.value - point.low for point in curve.points]
    above = [point.high - point.value for point in curve.points]
    axes.axhspan(
        curve.band_low, curve.band_high, color="#2a9d8f", alpha=0.22, lw=0, label="within the margin of the best"
    )
    if curve.base_value is not None:
        axes.axhline(curve.base_value, color="#777777", ls=":", lw=1.2, label="base model, no adapter")
    axes.errorbar(
        ranks, values, yerr=[below, above], fmt="none", ecolor="#264653", alpha=0.35, capsize=3, label="95% interval"
    )
    axes.plot(ranks, values, "o-", color="#264653", lw=1.8, ms=5, label="held-out, best learning rate")
    for point in curve.points:
        if point.rank == curve.chosen_rank:
            axes.plot(
                [point.rank],
                [point.value],
                "o",
                ms=13,
                mfc="none",
                mec="#e76f51",
                mew=2.4,
                label=f"chosen: rank {point.rank}",
            )
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.minorticks_off()
    axes.set_xlabel("LoRA rank")
    axes.set_ylabel("held-out loss, nats a token" if curve.metric == "loss" else f"held-out {curve.metric}")
    axes.set_title(_wrapped(curve.title), fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)


def terminal_curve(points: list[tuple[int, float]], width: int, height: int, colour: bool) -> str:
    """The curve so far, for a terminal; empty below two ranks."""
    if len(points) < 2:
        return ""
    import plotext

    positions = list(range(len(points)))
    plotext.clear_figure()
    plotext.plot_size(width, height)
    plotext.plot(positions, [value for _, value in points], marker="braille")
    plotext.scatter(positions, [value for _, value in points], marker="●")
    plotext.xticks(positions, [str(rank) for rank, _ in points])
    plotext.xlabel("LoRA rank")
    plotext.theme("clear")
    text: str = plotext.build()
    return text if colour else plotext.uncolorize(text)


def _wrapped(text: str, width: int = 84) -> str:
    from textwrap import fill

    return fill(text, width)
