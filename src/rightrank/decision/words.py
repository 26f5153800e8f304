"""One sentence for a person, and one on what the intervals cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rightrank.decision.evidence import Evidence
from rightrank.decision.judge import Judged, Unit
from rightrank.decision.verdicts import contested_rank, open_rival, read_off
from rightrank.records import RankEvidence, Verdict


def number(value: float) -> str:
    """Two digits that matter: 0.014, 0.0084, 1.2."""
    return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"


def amount(value: str, evidence: Evidence) -> str:
    """The value with its unit: `0.005 nats`, `0.5 in GSM8K`; a metric called `value` adds nothing."""
    if evidence.table.kind in ("token_loss", "loss"):
        return f"{value} nats"
    return value if evidence.table.metric == "value" else f"{value} in {evidence.table.metric}"


def sentence_of(
    judged: dict[int, Judged], evidence: Evidence, chosen: int, margin: float, verdict: Verdict, unit: Unit
) -> str:
    """The answer in one sentence."""
    within = amount(f"{margin:.4g}", evidence)
    reference = evidence.reference.rank
    ranks = sorted(evidence.contenders)
    likely = read_off(evidence)
    match verdict:
        case "no_gain":
            return (
                f"No gain: the base itself is within {within} of the best adapter (rank {reference}), "
                "so there is nothing for a rank to decide."
            )
        case "undecided":
            return _undecided(judged, evidence, chosen, margin, within, unit)
        case "overfitting":
            return (
                f"Rank {chosen} {'looks' if likely else 'is'} enough: beyond rank {reference} held-out results get "
                f"worse while training still gets better."
            )
        case "flat":
            return (
                f"Rank hardly matters here: rank {chosen}, the smallest tried, is within {within} of the best "
                f"({reference}){_caution(likely)}."
            )
        case "rising":
            return (
                f"Still rising: rank {chosen}, the largest tried, is better than every smaller one by more than "
                f"{within}{_caution(likely)}."
            )
        case "saturated":
            return _saturated(judged, evidence, chosen, within, unit, ranks)


def _saturated(
    judged: dict[int, Judged], evidence: Evidence, chosen: int, within: str, unit: Unit, ranks: list[int]
) -> str:
    reference, likely = evidence.reference.rank, read_off(evidence)
    if chosen == reference:
        start = f"Rank {chosen} {'looks' if likely else 'is'} right: it is the best of those tried"
    else:
        start = (
            f"Rank {chosen} {'looks' if likely else 'is'} enough: it is within {within} of the best (rank {reference})"
        )
    below = max((rank for rank in ranks if rank < chosen), default=None)
    if below is None:
        return f"{start}, and the smallest tried{_caution(likely)}."
    worse = number(unit.difference(judged[below].difference.mean))
    return f"{start}, and the next lower ({below}) is {worse} worse{_caution(likely)}."


def _caution(likely: bool) -> str:
    return "; one number a rank can suggest this, not show it" if likely else ""


def _undecided(
    judged: dict[int, Judged], evidence: Evidence, chosen: int, margin: float, within: str, unit: Unit
) -> str:
    contested = contested_rank(judged, evidence, chosen)
    if contested is None:
        rival = open_rival(judged, evidence, unit.oriented_margin(margin))
        assert rival is not None
        better = number(unit.difference(-judged[rival].low))
        return (
            f"Undecided: rank {evidence.reference.rank} came out best, but rank {rival} may be better by up to {better}, "
            f"more than the margin of {within}."
        )
    found = judged[contested]
    low, high = (number(unit.difference(value)) for value in (found.low, found.high))
    difference = unit.difference(found.difference.mean)
    worse = f"{number(abs(difference))} {'better' if difference < 0 else 'worse'}"
    if contested == 0:
        return (
            f"Undecided whether there is any gain: the base is {worse} than the best adapter, "
            f"but anything from {low} to {high} is possible, and the margin is {within}."
        )
    shown = (
        f"rank {chosen} is the best so far"
        if chosen == evidence.reference.rank
        else f"rank {chosen} is within {within} of the best (rank {evidence.reference.rank})"
    )
    return f"Undecided: {shown}; whether rank {contested} is enough is open, at {worse}, anything from {low} to {high}."


def conflict_sentence(metric: str, against: Sequence[int], theirs: Mapping[int, RankEvidence], margin: float) -> str:
    """What another metric says otherwise, of the largest rank that they differ on."""
    rank = max(against)
    difference = number(abs(theirs[rank].difference or 0.0))
    if theirs[rank].non_inferior:
        return f"{metric} says otherwise: by it rank {rank} is enough, within its margin of {margin:.4g}."
    return (
        f"{metric} says otherwise: by it rank {rank} is not enough, at {difference} worse (its margin is {margin:.4g})."
    )


def basis_note(evidence: Evidence) -> str:
    """What the intervals rest on, and what they leave out."""
    deviation = number(evidence.noise.own**0.5)
    match evidence.basis:
        case "items and seeds":
            return "Intervals cover other held-out items and other seeds."
        case "items":
            alone = "Intervals cover other held-out items. One seed can't show what another would give: "
            if evidence.noise.own == 0:
                return f"{alone}nothing is added for it, so they are too narrow by that."
            return (
                f"{alone}a published noise of {deviation} is added for each training, and this run's own may be larger."
            )
        case "seeds":
            return "Intervals cover other seeds, on these held-out items."
        case "std":
            return "Intervals rest on the stated standard deviations alone."
        case "values":
            return (
                f"One number a rank, and no stated noise: {deviation} is assumed for each training, "
                "the larger of published seed noise and the scatter about the curve."
            )
