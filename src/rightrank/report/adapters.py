"""The first question as plain data: every adapter of a run against the reference, as a figure and as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rightrank.decision.run import Records, compared
from rightrank.report.figure import Band, Figure, Mark, Series, Tone, metric_axis, rank_axis
from rightrank.schema.decision import AdapterAnswer, AdapterCandidate

SERIES: dict[str, tuple[str, Tone]] = {
    "trained": ("trained at that rank", "main"),
    "truncated": ("truncated from the top rank", "second"),
    "recovered": ("with steps of recovery", 2),
}
MAX_MARGINS = 6.0  # worse than the reference by more: off the scale, so that the margin stays readable
HOLDS = {True: "yes", False: "no"}


def adapter_figure(records: Records) -> Figure | None:
    """Held-out value by rank of trained, truncated and recovered adapters; None before the first answer."""
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
    reference = next(one.value - sign * one.difference for one in adapters)
    edge = reference + sign * answer.margin
    shown = [one for one in adapters if one.difference <= MAX_MARGINS * answer.margin]
    ends = [reference + sign * end for one in shown for end in _ends(one)] + [edge, reference]
    room = 0.06 * (max(ends) - min(ends) or 1.0)
    chosen = next(one for one in adapters if one.trial_id == answer.trial_id)
    off = sorted({one.rank for one in adapters} - {one.rank for one in shown})
    off_text = f" (off the scale: rank {', '.join(map(str, off))})" if off else ""
    return Figure(
        name="adapters",
        title=f"Trained and truncated adapters by rank{off_text}",
        alt=f"Held-out {metric} by LoRA rank. "
        + " ".join(f"Rank {one.rank}, {one.how}: worse by {one.difference:.2g}." for one in adapters)
        + f" {answer.sentence}",
        x=rank_axis([one.rank for one in adapters]),
        y=metric_axis(metric, "held-out", (min(ends) - room, max(ends) + room)),
        series=tuple(_series(how, adapters, reference, sign) for how in SERIES if any(a.how == how for a in adapters)),
        bands=(Band("within the margin; whiskers: paired 95% bounds", min(reference, edge), max(reference, edge)),),
        marks=(Mark(f"handed over: rank {chosen.rank}, {chosen.how}", chosen.rank, chosen.value),),
        columns=("rank", "how", "value", "difference", "lower bound", "upper bound", "holds"),
        rows=tuple(
            (one.rank, one.how, one.value, one.difference, one.difference_low, one.difference_high, HOLDS[one.holds])
            for one in adapters
        ),
    )


def candidate_table(answer: AdapterAnswer, metric: str) -> list[list[str]]:
    """The candidates as text, a heading first: rank, how, value, difference from the reference, its bound, whether it holds."""
    heading = ["rank", "how", metric, "worse by", "95% bound", "holds"]
    return [heading, *(_row(one, answer) for one in answer.candidates)]


def _row(one: AdapterCandidate, answer: AdapterAnswer) -> list[str]:
    is_reference = one.trial_id == answer.reference_id
    bound = "–" if one.difference_high is None else f"{one.difference_high:+.4f}"
    return [
        str(one.rank),
        one.how,
        f"{one.value:.4f}",
        "reference" if is_reference else f"{one.difference:+.4f}",
        "" if is_reference else bound,
        HOLDS[one.holds],
    ]


def _series(how: str, adapters: Sequence[AdapterCandidate], reference: float, sign: int) -> Series:
    own = sorted((one for one in adapters if one.how == how), key=lambda one: one.rank)
    ends = [sorted(reference + sign * end for end in _ends(one)) for one in own]
    label, tone = SERIES[how]
    return Series(
        label,
        tuple(one.rank for one in own),
        tuple(one.value for one in own),
        tuple(min(one.value, low) for one, (low, _) in zip(own, ends, strict=True)),
        tuple(max(one.value, high) for one, (_, high) in zip(own, ends, strict=True)),
        dashed=how != "trained",
        tone=tone,
    )


def _ends(one: AdapterCandidate) -> tuple[float, float]:
    """The bounds of the difference; the difference itself where there are none."""
    low = one.difference if one.difference_low is None else one.difference_low
    return low, one.difference if one.difference_high is None else one.difference_high
