"""The figure of performance against rank."""

from __future__ import annotations

from itertools import pairwise
from math import log2

from rightrank.records import Decision, RankEvidence
from rightrank.report.figure import Band, Figure, Level, Mark, Series, metric_axis, rank_axis
from rightrank.report.format import coverage


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
    fitted = _fitted(decision)
    limits = _limits([*points.low, *points.high, band.low, band.high, *(y for s in fitted for y in s.y)], base)
    values = ", ".join(f"rank {e.rank} {e.value:.4f}" for e in trained)
    return Figure(
        name="rank_curve",
        title="Performance against rank",
        alt=f"Held-out {decision.metric} against LoRA rank: {values}"
        + (f"; base without an adapter {base:.4f}" if base is not None else "")
        + f". {decision.sentence}",
        x=rank_axis(ranks),
        y=metric_axis(decision.metric, "held-out", limits),
        series=(points, *fitted),
        bands=(band,),
        levels=() if base is None else (_base_level(base, limits),),
        marks=tuple(_marks(decision, trained)),
        columns=("rank", "value", "low", "high", "paired bound"),
        rows=tuple((e.rank, e.value, e.low, e.high, e.difference_high) for e in decision.ranks),
    )


def _fitted(decision: Decision) -> list[Series]:
    """The fitted curve and the ends of its interval; empty if no curve was fitted."""
    if decision.curve is None or not decision.curve.points:
        return []
    points = decision.curve.points
    x = tuple(point.rank for point in points)
    label = f"fitted {decision.curve.form.replace('_', '-')} curve, {coverage(decision, 'interval')}"
    ends = [tuple(point.low for point in points), tuple(point.high for point in points)]
    middle = Series(label, x, tuple(point.value for point in points), kind="line", tone="second")
    return [middle, *(Series(label, x, end, kind="line", tone="faint", dashed=True) for end in ends)]


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

    It depends on the margin and on the ranks tried. It uses measured values only; the decision holds the counterpart
    of the fitted curve.
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
    chosen = decision.rank if decision.rank is not None else decision.fallback_rank
    refused = any(e.rank == chosen and e.non_inferior is False for e in decision.ranks)
    if chosen in values and not refused:
        label = "chosen" if decision.rank is not None else "shown to be enough so far"
        marks.append(Mark(f"{label}: rank {chosen}", chosen, values[chosen]))
    return marks
