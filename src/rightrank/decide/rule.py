"""The rule: the smallest rank that is not worse than the best by more than the margin.

The reference is the rank with the best mean, each rank at its best learning rate. Ranks below it are tested from
the top downward, each by the 95% upper bound of its paired difference from the reference; the first that fails ends
the search (a fixed sequence needs no correction for multiplicity).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rightrank.decide.table import Cell, ScoreTable
from rightrank.errors import ResultsError
from rightrank.maths.intervals import resampled_means
from rightrank.records import Decision, RankEvidence, StaircaseStep, Verdict

Floats = NDArray[np.float64]

CONFIDENCE = 0.95
RESAMPLES = 4000
TOKEN_LOSS_MARGIN = 0.005  # nats a token
ACCURACY_MARGIN = 0.005  # half a point
RELATIVE_MARGIN = 0.01  # of the reference, for every other metric
STAIRCASE_MARGINS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1)


def default_margin(metric: str, reference_value: float, token_loss: bool) -> float:
    """The margin when none is given: 0.005 nats a token, half a point of accuracy, else 1% of the reference."""
    if metric == "loss" and token_loss:
        return TOKEN_LOSS_MARGIN
    if metric == "accuracy":
        return ACCURACY_MARGIN
    return abs(reference_value) * RELATIVE_MARGIN


@dataclass(frozen=True, slots=True)
class _Contender:
    """One rank at its best rate."""

    rank: int
    rate: float
    cells: list[Cell]
    loss: float  # oriented mean over seeds: lower is better
    value: float  # in the metric's direction


def decide(table: ScoreTable, margin: float | None = None, token_loss: bool = True) -> Decision:
    """The decision that a table supports.

    Raises:
        ResultsError: fewer than two ranks have a finished trial, or the margin is not above 0.
    """
    contenders = {rank: _contender(table, rank) for rank in table.ranks()}
    if len(contenders) < 2:
        raise ResultsError(
            f"{len(contenders)} rank(s) with a finished trial: a comparison needs two or more; train further ranks"
        )
    reference = min(contenders.values(), key=lambda contender: (contender.loss, contender.rank))
    if margin is None:
        margin = default_margin(table.metric, reference.value, token_loss)
    if not margin > 0:
        raise ResultsError(f"margin {margin:g} is not allowed: give a number above 0 in the metric's unit")
    base = _contender(table, 0) if table.rates(0) else None
    everyone = ([base] if base else []) + list(contenders.values())
    evidence = {contender.rank: _evidence(contender, reference, table, margin) for contender in everyone}
    chosen = _walk_down(evidence, reference.rank, margin)
    verdict = _verdict(evidence, contenders, reference, chosen, margin, base)
    flags = _flags(table, contenders, reference)
    sentence, next_run = _words(verdict, chosen, reference, margin, contenders, table)
    return Decision(
        rank=None if verdict in ("no_gain", "undecided") else chosen,
        fallback_rank=chosen,
        verdict=verdict,
        flags=flags,
        sentence=sentence,
        next_run=next_run,
        metric=table.metric,
        higher_is_better=table.higher_is_better,
        margin=margin,
        reference_rank=reference.rank,
        confidence=CONFIDENCE,
        learning_rate=contenders[chosen].rate,
        staircase=_staircase(evidence, reference.rank, margin),
        ranks=[evidence[rank] for rank in sorted(evidence)],
    )


def _contender(table: ScoreTable, rank: int) -> _Contender:
    """The rank at its best rate: the best mean over seeds, the lower rate on ties."""
    columns = {rate: table.column(rank, rate) for rate in table.rates(rank)}
    rate = min(columns, key=lambda rate: (float(np.mean([cell.loss for cell in columns[rate]])), rate))
    cells = columns[rate]
    return _Contender(
        rank,
        rate,
        cells,
        float(np.mean([cell.loss for cell in cells])),
        float(np.mean([cell.value for cell in cells])),
    )


def _evidence(contender: _Contender, reference: _Contender, table: ScoreTable, margin: float) -> RankEvidence:
    low, high = np.quantile(_resampled(contender.cells), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if table.higher_is_better:
        low, high = -high, -low
    difference, bound = 0.0, 0.0
    if contender.rank != reference.rank:
        pairs = _paired(contender, reference)
        difference = float(np.mean([cell.loss for cell in pairs]))
        bound = float(np.quantile(_resampled(pairs), CONFIDENCE))
    return RankEvidence(
        rank=contender.rank,
        value=contender.value,
        low=float(low),
        high=float(high),
        difference=difference,
        difference_high=bound,
        non_inferior=bound < margin,
        learning_rate=contender.rate or None,
        seeds=len(contender.cells),
        trial_ids=[cell.trial_id for cell in contender.cells],
    )


def _paired(contender: _Contender, reference: _Contender) -> list[Cell]:
    """Differences seed by seed and item by item; the base's one evaluation pairs with every seed."""
    count = max(len(contender.cells), len(reference.cells))
    left = contender.cells * count if len(contender.cells) == 1 else contender.cells
    right = reference.cells * count if len(reference.cells) == 1 else reference.cells
    return [
        Cell(a.trial_id, a.value - b.value, a.sums - b.sums, a.weights, None) for a, b in zip(left, right, strict=False)
    ]


def _resampled(cells: list[Cell]) -> Floats:
    generator = np.random.default_rng(0x5EED)  # the same draws for every rank: bounds move together
    sums = np.stack([cell.sums for cell in cells])
    weights = np.stack([cell.weights for cell in cells])
    return resampled_means(sums, weights, RESAMPLES, generator)


def _walk_down(evidence: dict[int, RankEvidence], reference_rank: int, margin: float) -> int:
    """The smallest rank reached from the reference downward before the first that fails."""
    chosen = reference_rank
    for rank in sorted((rank for rank in evidence if 0 < rank < reference_rank), reverse=True):
        bound = evidence[rank].difference_high
        if bound is None or bound >= margin:
            break
        chosen = rank
    return chosen


def _verdict(
    evidence: dict[int, RankEvidence],
    contenders: dict[int, _Contender],
    reference: _Contender,
    chosen: int,
    margin: float,
    base: _Contender | None,
) -> Verdict:
    ranks = sorted(contenders)
    if base is not None and evidence[0].non_inferior:
        return "no_gain"
    below = [rank for rank in ranks if rank < chosen]
    if below and _could_be_enough(evidence[below[-1]], margin):
        return "undecided"
    if chosen == ranks[0]:
        return "flat"
    if _overfits(contenders, reference, margin):
        return "overfitting"
    if chosen == ranks[-1]:
        return "rising"
    return "saturated"


def _could_be_enough(evidence: RankEvidence, margin: float) -> bool:
    """The rank failed only because its interval is wide: its difference itself is inside the margin."""
    return not evidence.non_inferior and evidence.difference is not None and evidence.difference < margin


def _overfits(contenders: dict[int, _Contender], reference: _Contender, margin: float) -> bool:
    """Held-out loss rises beyond the reference by more than the margin while training loss falls."""
    top = contenders[max(contenders)]
    if top.rank == reference.rank or top.loss - reference.loss <= margin:
        return False
    top_train = [cell.train_value for cell in top.cells if cell.train_value is not None]
    reference_train = [cell.train_value for cell in reference.cells if cell.train_value is not None]
    return bool(top_train and reference_train) and float(np.mean(top_train)) < float(np.mean(reference_train))


def _flags(table: ScoreTable, contenders: dict[int, _Contender], reference: _Contender) -> list[str]:
    flags: list[str] = []
    rates = table.rates(reference.rank)
    if len(rates) > 1 and reference.rate in (rates[0], rates[-1]):
        flags.append("lr_edge")
    if any(table.missing.values()):
        flags.append("unstable")
    if min(len(contender.cells) for contender in contenders.values()) < 2:
        flags.append("one_seed")
    return flags


def _staircase(evidence: dict[int, RankEvidence], reference_rank: int, margin: float) -> list[StaircaseStep]:
    """Margin → rank, one step where the rank changes and one at the margin asked for."""
    margins = sorted({*STAIRCASE_MARGINS, margin})
    return [StaircaseStep(margin=value, rank=_walk_down(evidence, reference_rank, value)) for value in margins]


def _words(
    verdict: Verdict,
    chosen: int,
    reference: _Contender,
    margin: float,
    contenders: dict[int, _Contender],
    table: ScoreTable,
) -> tuple[str, str]:
    unit = f"{margin:g} {'nats' if table.metric == 'loss' else table.metric}"
    top = max(contenders)
    seeds = "one more seed" if len(reference.cells) == 1 else "two more seeds"
    words: dict[Verdict, tuple[str, str]] = {
        "saturated": (
            f"Rank {chosen} is enough: it is within {unit} of the best rank tried ({reference.rank}), and the next lower rank is not.",
            f"{seeds} at ranks {chosen} and {reference.rank} would confirm it.",
        ),
        "flat": (
            f"Rank hardly matters here: rank {chosen}, the smallest tried, is within {unit} of the best ({reference.rank}).",
            "Take the smallest rank; a longer training may need more.",
        ),
        "rising": (
            f"Performance still rises at rank {top}, the largest tried: no smaller rank is within {unit} of it.",
            f"Train rank {2 * top}, or accept a larger margin.",
        ),
        "overfitting": (
            f"Beyond rank {reference.rank} held-out loss rises while training loss falls; rank {chosen} is within {unit} of the best.",
            "More data or fewer steps would let larger ranks help.",
        ),
        "undecided": (
            f"Undecided: rank {chosen} is within {unit} of the best, and a lower rank may be too, but its interval is wider than the margin.",
            f"{seeds} at ranks {_next_lower(contenders, chosen)} and {reference.rank}, or more held-out items, would settle it.",
        ),
        "no_gain": (
            f"No gain: the base itself is within {unit} of the best adapter, so there is nothing for a rank to decide.",
            "Check the data and the learning rates, or train longer.",
        ),
    }
    return words[verdict]


def _next_lower(contenders: dict[int, _Contender], rank: int) -> int:
    return max((other for other in contenders if other < rank), default=rank)
