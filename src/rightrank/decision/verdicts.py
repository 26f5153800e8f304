"""What kind of answer it is, and what to be wary of."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np

from rightrank.decision.evidence import Contender, Evidence
from rightrank.decision.judge import Judged
from rightrank.decision.metrics import default_margin, direction, kind_of, published_deviation
from rightrank.records import CurveFit, HorizonNote, Verdict

OCTAVE = 2


def read_off(evidence: Evidence) -> bool:
    """One number a rank: differences are read, nothing is shown."""
    return evidence.basis in ("std", "values")


def verdict_of(judged: dict[int, Judged], evidence: Evidence, chosen: int, margin: float) -> Verdict:
    """The first that applies, from the most sobering down."""
    ranks = sorted(evidence.contenders)
    if 0 in judged and judged[0].within:
        return "no_gain"
    if contested_rank(judged, evidence, chosen) is not None or open_rival(judged, evidence, margin) is not None:
        return "undecided"
    if overfits(judged, evidence):
        return "overfitting"
    if chosen == ranks[0] and all(_not_worse(judged[rank], evidence) for rank in ranks):
        return "flat"
    if chosen == ranks[-1] and rises(judged, evidence, margin):
        return "rising"
    return "saturated"


def contested_rank(judged: dict[int, Judged], evidence: Evidence, chosen: int) -> int | None:
    """The rank (or the base, 0) whose openness leaves the answer open; None where the answer is known to an octave.

    The chosen rank is shown to be enough. It is the answer if no rank more than an octave below it may be enough too;
    one octave below may stay open, since too much rank costs less than too little. The largest rank tried is the
    answer only where the next lower one is refuted: else it is open whether anything rises.
    """
    if read_off(evidence):
        return None
    if 0 in judged and judged[0].non_inferior is None:
        return 0
    ranks = sorted(evidence.contenders)
    lower = [rank for rank in ranks if rank < chosen]
    if not lower or judged[lower[-1]].non_inferior is False:
        return None
    if chosen == ranks[-1]:
        return lower[-1]
    far = [rank for rank in lower if OCTAVE * rank < chosen]
    if not far or judged[far[-1]].non_inferior is False:
        return None
    return far[-1] if judged[far[-1]].non_inferior is None else lower[-1]


def open_rival(judged: dict[int, Judged], evidence: Evidence, margin: float) -> int | None:
    """The rank above the reference that may yet be better than it by more than the margin; None if none may.

    Without this a low rank that came out best by luck would be taken on no evidence.
    """
    if read_off(evidence):
        return None
    above = [rank for rank in evidence.contenders if rank > evidence.reference.rank and judged[rank].low < -margin]
    return min(above, key=lambda rank: judged[rank].low, default=None)


def rises(judged: dict[int, Judged], evidence: Evidence, margin: float) -> bool:
    """The top rank is better than every smaller one by more than the margin, and than a stated deviation."""
    ranks = sorted(evidence.contenders)
    if evidence.reference.rank != ranks[-1]:
        return False
    stated = [cell.deviation or 0.0 for cell in evidence.reference.cells.values()]
    least = max(margin, *stated) if evidence.basis == "std" else margin
    return all(judged[rank].difference.mean > least * (1 + 1e-9) for rank in ranks[:-1])


def overfits(judged: dict[int, Judged], evidence: Evidence) -> bool:
    """Beyond the reference held-out is worse than the margin allows, while training is better. It takes both."""
    top = evidence.contenders[max(evidence.contenders)]
    if top.rank == evidence.reference.rank or _not_worse(judged[top.rank], evidence):
        return False
    ours, theirs = _train_value(top), _train_value(evidence.reference)
    return ours is not None and theirs is not None and ours < theirs


def _not_worse(judged: Judged, evidence: Evidence) -> bool:
    return judged.within if read_off(evidence) else judged.non_inferior is not False


def _train_value(contender: Contender) -> float | None:
    """Mean training loss: lower is better, whatever the metric."""
    values = [cell.train_value for cell in contender.cells.values() if cell.train_value is not None]
    return float(np.mean(values)) if values else None


def flags_of(
    judged: dict[int, Judged],
    evidence: Evidence,
    chosen: int,
    margin: float,
    verdict: Verdict,
    curve: CurveFit | None,
    horizon: HorizonNote | None,
    horizon_steps: int | None,
    judged_others: Collection[str] = (),
) -> list[str]:
    """In this order; each has an entry in docs/how-to/decide.md. `judged_others`: metrics with a judgement of their own."""
    top = max(evidence.contenders)
    gaps = [judged[rank].contender.gap for rank in (chosen, evidence.reference.rank)]
    trained = max((cell.steps or 0 for cell in evidence.reference.cells.values()), default=0)
    beyond = curve is not None and curve.diminishing_rank is not None and curve.diminishing_rank > top
    raised = {
        "underpowered": underpowered(judged, evidence, chosen, verdict),
        "rising": verdict == "undecided"
        and rises(judged, evidence, margin)
        and all(judged[rank].low > 0 for rank in evidence.contenders if rank < top),
        "lr_edge": any(_at_edge(evidence, rank) for rank in {chosen, evidence.reference.rank}),
        "unstable": any(evidence.table.missing.values()),
        "one_seed": min(len(contender.cells) for contender in evidence.contenders.values()) < 2,
        "winner_gap": max(gaps) > margin / 2,
        "metric_conflict": _conflicts(evidence, chosen, judged_others),
        "may_be_capacity_limited": _still_parting(judged[chosen], margin, horizon),
        "extrapolated": beyond or (horizon_steps is not None and 0 < trained < horizon_steps),
    }
    return [flag for flag, raise_it in raised.items() if raise_it]


def underpowered(judged: dict[int, Judged], evidence: Evidence, chosen: int, verdict: Verdict) -> bool:
    """The data can't show the answer at the confidence asked for."""
    if not read_off(evidence):
        return verdict == "undecided"
    below = max((rank for rank in evidence.contenders if rank < chosen), default=None)
    settled = judged[chosen].non_inferior is True and (below is None or judged[below].non_inferior is False)
    return evidence.basis == "values" or not settled


def _at_edge(evidence: Evidence, rank: int) -> bool:
    rates = evidence.table.rates(rank)
    return len(rates) > 1 and evidence.contenders[rank].rate in (rates[0], rates[-1])


def _still_parting(judged: Judged, margin: float, horizon: HorizonNote | None) -> bool:
    """As much growth again would take the chosen rank's gap over the margin."""
    if horizon is None or horizon.gap_growth is None or horizon.gap_growth <= 0:
        return False
    return judged.difference.mean + horizon.gap_growth > margin


def _conflicts(evidence: Evidence, chosen: int, judged_others: Collection[str]) -> bool:
    """Under another metric of the same trials, known by its value alone, the chosen rank is clearly worse than the best."""
    names = set.intersection(*(set(cell.others) for c in evidence.contenders.values() for cell in c.cells.values()))
    return any(_conflicts_in(evidence, chosen, name) for name in sorted(names - set(judged_others)))


def _conflicts_in(evidence: Evidence, chosen: int, name: str) -> bool:
    higher = direction(name)
    if higher is None:
        return False
    kind = kind_of(name, higher)
    sign = -1.0 if higher else 1.0
    means = {
        rank: float(np.mean([cell.others[name] for cell in contender.cells.values()]))
        for rank, contender in evidence.contenders.items()
    }
    values = list(means.values())
    best = min(sign * value for value in values)
    if kind == "perplexity":
        return math.log(means[chosen] / best) > default_margin("token_loss", best, values) if best > 0 else False
    noise = 2 * math.sqrt(2) * published_deviation(kind, best, values)
    return sign * means[chosen] - best > max(default_margin(kind, best, values), noise)
