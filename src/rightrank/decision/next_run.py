"""Plan the next run that is expected to settle or extend the answer (its command: `schema.command`).

More seeds or examples are planned with the present differences, which are themselves uncertain: a plan is no guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from rightrank.decision.adapter import format_no_gain_advice
from rightrank.decision.comparison import MAX_SEEDS, is_within
from rightrank.decision.evidence import Evidence
from rightrank.decision.ranks import Comparison, find_unexplained_rank, format_rank_names
from rightrank.decision.table import ScoreTable
from rightrank.schema.decision import NextRun, Verdict

CONFIRM_SEEDS = 3
EXAMPLE_COUNTS = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)  # numbers of held-out examples to suggest


def plan_next_runs(comparison: Comparison, verdict: Verdict) -> list[NextRun]:
    """Plan the next runs, the most useful first. The list is never empty."""
    if verdict == "no_gain":
        return [_plan_after_no_gain(comparison.evidence)]
    evidence, ranks = comparison.evidence, sorted({comparison.chosen, comparison.reference.rank})
    runs: list[NextRun] = []
    if verdict == "undecided":
        if (failed := find_unexplained_rank(comparison)) is not None:
            runs.append(_plan_repetition(comparison, failed))
        if comparison.is_open:
            runs.extend(_plan_runs_for_confidence(comparison))
    elif comparison.chosen == comparison.ranks[-1] and (verdict == "rising" or not evidence.lacks_uncertainty):
        runs.append(_plan_larger_rank(evidence))
    rate_runs = [plan_rate_run(evidence.table, rank, evidence.contenders[rank].learning_rate, ranks) for rank in ranks]
    position = 1 if verdict in ("rising", "undecided") else 0
    runs[position:position] = [run for run in rate_runs if run is not None][:1]
    if verdict != "undecided":
        runs.append(_plan_confirmation(comparison, is_last=not runs))
    return runs


def _plan_repetition(comparison: Comparison, rank: int) -> NextRun:
    """Plan to repeat the training that probably failed: at a lower learning rate if none was tried, else with another seed."""
    evidence, start = comparison.evidence, f"Train rank {rank} again"
    if evidence.has_lower_rate(rank):
        seeds = len(evidence.contenders[rank].cells) + 1
        sentence = f"{start} with another seed ({_format_cost(1)}): it may have failed."
        return NextRun(action="seeds", ranks=[rank], seeds=seeds, trials=1, sentence=sentence)
    rate = evidence.contenders[rank].learning_rate
    lower = [extrapolate_rate(rate, EDGE_FACTOR * rate, _collect_tried_rates(evidence.table))] if rate > 0 else []
    at = f"at learning rate {lower[0]:.2g} (now {rate:.2g})" if lower else "at a lower learning rate"
    return NextRun(
        action="rates", ranks=[rank], learning_rates=lower, trials=1, sentence=f"{start} {at}: it may have failed."
    )


def _plan_runs_for_confidence(comparison: Comparison) -> list[NextRun]:
    """Plan more examples, and more seeds, that would give a rank the requested probability. Examples need no training and come first."""
    evidence, confidence, margin = comparison.evidence, comparison.confidence, comparison.margin
    assert confidence is not None
    (seeds, examples), ranks = evidence.size, comparison.list_indistinguishable_ranks()

    def is_reached(more_seeds: int, more_examples: int) -> bool:
        return is_within(min(evidence.compute_margins(confidence, more_seeds, more_examples).values()), margin)

    sizes = [size for size in EXAMPLE_COUNTS if size > examples > 0]
    needed_examples = next((size for size in sizes if is_reached(seeds, size)), None)
    needed_seeds = next((count for count in range(seeds + 1, MAX_SEEDS + 1) if is_reached(count, examples)), None)
    runs: list[NextRun] = []
    if needed_examples is not None:
        sentence = f"To test the margin, score about {needed_examples:,} held-out examples (now {examples:,}) at {format_rank_names(ranks)}."
        runs.append(NextRun(action="examples", ranks=ranks, examples=needed_examples, sentence=sentence))
    if needed_seeds is not None:
        sentence = (
            f"Train {format_rank_names(ranks)} with {needed_seeds} seeds (now {seeds}) to test the margin ({{cost}})."
        )
        runs.append(_build_seed_run(evidence, ranks, needed_seeds, sentence))
    if not runs:
        more = f"Neither {sizes[-1]:,} held-out examples nor" if sizes else "Not even"
        sentence = f"{more} {MAX_SEEDS} seeds would settle it at this noise: take rank {comparison.chosen}, or choose another margin."
        runs.append(NextRun(action="none", ranks=[comparison.chosen], sentence=sentence))
    return runs


def _plan_larger_rank(evidence: Evidence) -> NextRun:
    top = evidence.reference
    rate = top.learning_rate
    lrs = [extrapolate_rate(rate, EDGE_FACTOR * rate, _collect_tried_rates(evidence.table)), rate] if rate > 0 else []
    trials = len(lrs) or 1
    at = f" at learning rates {' and '.join(f'{lr:.2g}' for lr in lrs)}" if lrs else ""
    sentence = f"Train rank {2 * top.rank}{at} ({_format_cost(trials)}), or accept a larger margin."
    return NextRun(action="rank", ranks=[2 * top.rank], learning_rates=lrs, trials=trials, sentence=sentence)


def plan_rate_run(table: ScoreTable, rank: int, learning_rate: float, ranks: list[int]) -> NextRun | None:
    """Plan `ranks` at the learning rate beyond the rank's best one, or return None if the best one is not at an edge."""
    rates = table.list_edge_rates(learning_rate, rank)
    if not rates:
        return None
    inner = rates[1] if learning_rate == rates[0] else rates[-2]
    lr = extrapolate_rate(learning_rate, inner, _collect_tried_rates(table))
    sentence = (
        f"The best learning rate of rank {rank} is at the edge of those tried: train {format_rank_names(ranks)} at {lr:.2g} too "
        f"({_format_cost(len(ranks))})."
    )
    return NextRun(action="rates", ranks=ranks, learning_rates=[lr], trials=len(ranks), sentence=sentence)


def _collect_tried_rates(table: ScoreTable) -> set[float]:
    return {rate for rank in table.list_ranks() for rate in table.list_tried_rates(rank)}


def _plan_confirmation(comparison: Comparison, is_last: bool) -> NextRun:
    """Plan `CONFIRM_SEEDS` paired seeds at the answer, the next lower rank and the reference.

    Args:
        is_last: no other run is planned.
    """
    ranks = sorted({comparison.chosen, comparison.reference.rank, comparison.next_lower_rank or comparison.chosen})
    if comparison.evidence.basis == "values":
        sentence = f"One number per rank can't show the answer: score {format_rank_names(ranks)} by example, with {CONFIRM_SEEDS} seeds or more."
        return NextRun(action="examples", ranks=ranks, seeds=CONFIRM_SEEDS, sentence=sentence)
    if _count_missing_trainings(comparison.evidence, ranks, CONFIRM_SEEDS) == 0:
        start = "No more training is needed: evaluate" if is_last else "Then evaluate"
        sentence = f"{start} {format_rank_names(ranks)} once on held-out data that was not used for any choice."
        return NextRun(action="test", ranks=ranks, sentence=sentence)
    sentence = f"Train {format_rank_names(ranks)} with {CONFIRM_SEEDS} seeds to confirm it ({{cost}})."
    return _build_seed_run(comparison.evidence, ranks, CONFIRM_SEEDS, sentence)


def _plan_after_no_gain(evidence: Evidence) -> NextRun:
    rate = EDGE_FACTOR * max(contender.learning_rate for contender in evidence.contenders.values())
    rates = [float(f"{rate:.2g}")] if rate else []
    return NextRun(
        action="rates",
        ranks=[min(evidence.contenders)],
        learning_rates=rates,
        trials=1,
        sentence=format_no_gain_advice(rate),
    )


def _count_missing_trainings(evidence: Evidence, ranks: list[int], seeds: int) -> int:
    """Count the additional trainings with which each of the ranks has `seeds` seeds."""
    return sum(max(0, seeds - len(evidence.contenders[rank].cells)) for rank in ranks)


def _build_seed_run(evidence: Evidence, ranks: list[int], seeds: int, sentence: str) -> NextRun:
    """Return a run of the ranks with `seeds` seeds each. `sentence` has `{cost}` for the number of trainings."""
    trials = _count_missing_trainings(evidence, ranks, seeds)
    sentence = sentence.format(cost=_format_cost(trials))
    return NextRun(action="seeds", ranks=ranks, seeds=seeds, trials=trials, sentence=sentence)


def _format_cost(trials: int) -> str:
    return "1 training" if trials == 1 else f"{trials} trainings"


EDGE_FACTOR = 3  # the factor beyond the best learning rate if no other rate suggests one


def extrapolate_rate(edge: float, inner: float, tried_rates: Iterable[float] = ()) -> float:
    """Return a learning rate beyond the edge by the step between the edge and its neighbor.

    A rate that was tried at another rank is preferred if one is near, else a round number.
    """
    if edge == 0 or inner == 0:
        return edge * EDGE_FACTOR or inner / EDGE_FACTOR
    factor = edge / inner
    lr = edge * factor
    for candidate in (*sorted(tried_rates), float(f"{lr:.0e}")):
        if candidate and abs(math.log(candidate / lr)) < abs(math.log(factor)) / 4:
            return candidate
    return float(f"{lr:.3g}")
