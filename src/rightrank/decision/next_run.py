"""The next run that is expected to settle the answer, by a power calculation on the measured parts of the variance.

A run is expected to settle a rank if it shows or refutes it in four of five cases, given the difference seen so far. That
difference is itself uncertain, so the result is a plan and no guarantee. Of a run folder it is a command too.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice

from rightrank.decision.comparison import (
    MAX_EXAMPLE_GROWTH,
    MAX_SEEDS,
    Estimate,
    examples_needed,
    is_within,
    seeds_needed,
    settles,
)
from rightrank.decision.evidence import Comparison, Evidence
from rightrank.decision.table import ScoreTable
from rightrank.decision.verdicts import (
    has_lower_rate,
    inconclusive_rank,
    is_open,
    is_unlikely,
    lengths,
    names,
    possible_rival,
    shown_rank,
    unexplained_rank,
)
from rightrank.schema.decision import NextRun, Verdict
from rightrank.schema.events import RunStarted
from rightrank.schema.settings import MAX_SEED

MIN_SEEDS = 2  # with which the noise over seeds is measured
CHEAP_EXAMPLE_GROWTH = 24  # scoring up to so many times the examples usually costs less than further trainings
CONFIRM_SEEDS = 3
SIZES = (500, 1000, 2000, 5000, 10_000, 20_000, 50_000)  # of held-out examples
EDGE_FACTOR = 3  # the step beyond the best learning rate where no other learning rate gives one


def next_runs(tested: Comparison, verdict: Verdict, flags: list[str]) -> list[NextRun]:
    """What to run next, the most useful first. Never empty."""
    runs: list[NextRun] = []
    if verdict == "no_gain":
        runs.append(_after_no_gain(tested.evidence))
    elif verdict == "undecided":
        if (unexplained := unexplained_rank(tested)) is not None:
            runs.append(_repeat(tested, unexplained))
        if is_unlikely(tested):
            runs.extend(_purchases(tested))
        elif is_open(tested):
            runs.extend(_settle(tested, *_undecided_rank(tested)))
    elif tested.chosen == tested.ranks[-1] and (verdict == "rising" or not tested.evidence.is_point_reading):
        runs.append(_extend(tested.evidence))
    if "lr_edge" in flags:
        runs.insert(1 if verdict in ("rising", "undecided") else 0, _beyond_the_edge(tested))
    if "unequal_length" in flags:
        runs.append(_equal_lengths(tested.evidence))
    if verdict not in ("no_gain", "undecided"):
        if tested.evidence.is_point_reading and "underpowered" in flags:
            runs.append(_prove(tested))
        else:
            runs.append(_further_seeds(tested) if tested.rests_on_examples else _confirm(tested))
    return runs


def _repeat(tested: Comparison, rank: int) -> NextRun:
    """The training that probably failed once more: at a lower learning rate where none was tried, else with another seed."""
    evidence, start = tested.evidence, f"Train rank {rank} again"
    if has_lower_rate(tested, rank):
        return _train_seeds(
            evidence,
            [rank],
            len(evidence.contenders[rank].cells) + 1,
            f"{start} with another seed ({{cost}}): it may have failed.",
        )
    rate = evidence.contenders[rank].learning_rate
    lower = [_beyond(rate, EDGE_FACTOR * rate, _known_rates(evidence.table))] if rate > 0 else []
    at = f"at learning rate {lower[0]:.2g} (now {rate:.2g})" if lower else "at a lower learning rate"
    return NextRun(
        action="rates", ranks=[rank], learning_rates=lower, trials=1, sentence=f"{start} {at}: it may have failed."
    )


def _undecided_rank(tested: Comparison) -> tuple[int, Estimate]:
    """The rank that leaves the answer undecided, and the difference to compare with the margin."""
    rank = inconclusive_rank(tested)
    if rank is not None:
        return rank, tested.by_rank[rank].difference
    rival = possible_rival(tested)
    assert rival is not None
    better = tested.by_rank[rival].difference
    return rival, replace(better, mean=-better.mean, skewness=-better.skewness)  # how much worse the reference is


def _settle(tested: Comparison, rank: int, difference: Estimate) -> list[NextRun]:
    """More examples or more seeds at `rank` and the reference, the cheaper first; another margin if neither can settle it."""
    ranks = sorted({rank, tested.reference.rank} - {0})
    compared = _ranks(sorted({rank, tested.reference.rank}))
    runs = []
    examples = examples_needed(difference, tested.margin)
    seeds = None if tested.rests_on_examples else seeds_needed(difference, tested.margin)
    if examples is not None:
        noun, size = _drawn(tested)
        sentence = f"Score about {examples:,} {noun} (now {difference.examples:,}) at {compared} to settle it."
        runs.append(NextRun(action="items", ranks=ranks, items=round(examples * size), sentence=sentence))
    if seeds is not None:
        sentence = f"Train {compared} with {seeds} seeds (now {difference.seeds}) to settle it ({{cost}})."
        runs.append(_train_seeds(tested.evidence, ranks, seeds, sentence))
    if examples is not None and seeds is not None and examples > CHEAP_EXAMPLE_GROWTH * difference.examples:
        runs.reverse()
    if tested.rests_on_examples:
        runs.append(_further_seeds(tested, rank))
    elif not runs:
        runs.append(_more_of_both(tested, rank, difference))
    return runs


def _purchases(tested: Comparison) -> list[NextRun]:
    """What would give a rank the probability that was asked for: more examples, more seeds, or both; the cheaper first."""
    evidence, asked, margin = tested.evidence, tested.confidence, tested.margin
    assert asked is not None
    (seeds, examples), ranks = evidence.size, evidence.alike(asked)
    cells = [cell for rank in ranks for cell in evidence.contenders[rank].cells.values()]

    def reach(more_seeds: int, more_examples: int) -> bool:
        return is_within(min(evidence.margins_at(asked, more_seeds, more_examples).values()), margin)

    sizes = [size for size in SIZES if size > examples]
    counts = range(seeds + 1, MAX_SEEDS + 1)
    items = next((size for size in sizes if reach(seeds, size)), None)
    trained = next((count for count in counts if reach(count, examples)), None)
    runs: list[NextRun] = []
    if items is not None:
        minutes = _minutes(items * sum(cell.eval_seconds for cell in cells) / examples)
        told = "" if trained is not None else "; further seeds alone would not do it"
        sentence = f"To test the margin, score about {items:,} held-out examples (now {examples:,}) at {_ranks(ranks)}{time_told(minutes)}{told}."
        runs.append(NextRun(action="items", ranks=ranks, items=items, minutes=minutes, sentence=sentence))
    if trained is not None or items is None:
        wanted: tuple[int, int | None] | None = (trained, None) if trained is not None else None
        if wanted is None:
            fewest = next((count for count in counts if sizes and reach(count, sizes[-1])), None)
            if fewest is not None:
                wanted = fewest, next(size for size in sizes if reach(fewest, size))
        if wanted is None:
            sentence = f"Not even {MAX_SEEDS} seeds would settle it at this noise: take rank {tested.chosen}, or choose another margin."
            return [NextRun(action="none", ranks=[tested.chosen], sentence=sentence)]
        count, size = wanted
        minutes = _minutes(
            _missing(evidence, ranks, count)
            * sum(cell.train_seconds + cell.eval_seconds for cell in cells)
            / len(cells)
        )
        scored = "" if size is None else f" and score about {size:,} held-out examples (now {examples:,})"
        sentence = f"Train {_ranks(ranks)} with {count} seeds (now {seeds}){scored} to test it ({{cost}}{time_told(minutes, ', ')})."
        runs.append(_train_seeds(evidence, ranks, count, sentence, size).model_copy(update={"minutes": minutes}))
    return sorted(runs, key=lambda run: math.inf if run.minutes is None else run.minutes)


def _minutes(seconds: float) -> float | None:
    return round(seconds / 60, 1) if seconds > 0 else None


def time_told(minutes: float | None, before: str = " (") -> str:
    """` (about 3 minutes)`; empty where it is not known."""
    if minutes is None:
        return ""
    known = (
        f"{60 * minutes:.0f} seconds"
        if minutes < 1.5
        else f"{minutes:,.0f} minutes"
        if minutes < 90
        else f"{minutes / 60:,.1f} hours"
    )
    return f"{before}about {known}{')' * before.endswith('(')}"


def _more_of_both(tested: Comparison, rank: int, difference: Estimate) -> NextRun:
    """The fewest further seeds with which more examples settle it; another margin if not even they do."""
    ranks = sorted({rank, tested.reference.rank} - {0})
    for seeds in range(difference.seeds + 1, MAX_SEEDS + 1):
        examples = examples_needed(difference.at(difference.examples, seeds), tested.margin)
        if examples is not None:
            noun, size = _drawn(tested)
            sentence = (
                f"Train {_ranks(ranks)} with {seeds} seeds (now {difference.seeds}) and score about {examples:,} {noun} "
                f"(now {difference.examples:,}) to settle it ({{cost}})."
            )
            return _train_seeds(tested.evidence, ranks, seeds, sentence, round(examples * size))
    at_hand = shown_rank(tested) or tested.reference.rank
    examples_too = f" with {MAX_EXAMPLE_GROWTH} times the examples" if difference.examples else ""
    sentence = f"Not even {MAX_SEEDS} seeds{examples_too} would settle {_name(rank)} at this noise: take rank {at_hand}, or choose another margin."
    return NextRun(action="none", ranks=[at_hand], sentence=sentence)


def _drawn(tested: Comparison) -> tuple[str, float]:
    """What a bound is over, and the examples of each."""
    cell = next(iter(tested.reference.cells.values()))
    return f"{'' if cell.groups is None else 'groups of '}held-out examples", cell.examples / cell.units


def _further_seeds(tested: Comparison, undecided: int | None = None) -> NextRun:
    """The seeds that are expected to make a decision of an indication, at the seed noise of earlier grids."""
    evidence, reference = tested.evidence, tested.reference.rank
    compared = {tested.chosen, tested.next_lower or tested.chosen, undecided or tested.chosen} - {reference}
    known = [
        rank
        for rank in sorted(compared)
        if rank in (tested.chosen, undecided) or tested.by_rank[rank].non_inferior is False
    ]
    sizes = range(MIN_SEEDS, MAX_SEEDS + 1)
    needed = [
        next((n for n in sizes if settles(evidence.expected(evidence.contenders[rank], n), tested.margin)), None)
        for rank in known
    ]
    enough = [seeds for seeds in needed if seeds is not None]
    seeds = max(enough, default=MIN_SEEDS) if len(enough) == len(needed) else MIN_SEEDS
    ranks = sorted(compared | {reference})
    start = f"Train {_ranks(ranks)} with {seeds} seeds (now 1)"
    if len(enough) == len(needed):
        sentence = f"{start} to make it a decision, if the seed noise is that of earlier grids ({{cost}})."
    else:
        sentence = (
            f"{start} to measure the noise over seeds ({{cost}}); at that of earlier grids, {MAX_SEEDS} seeds "
            "would not make it a decision at this margin."
        )
    return _train_seeds(evidence, ranks, seeds, sentence)


def _equal_lengths(evidence: Evidence) -> NextRun:
    """All trainings at the length of the longest."""
    steps = max(lengths(evidence))
    short = {
        rank: sum(cell.steps not in (None, steps) for cell in contender.cells.values())
        for rank, contender in sorted(evidence.contenders.items())
    }
    ranks, trials = [rank for rank in short if short[rank]], sum(short.values())
    sentence = (
        f"Train {_ranks(ranks)} for {steps} steps too ({_cost(trials)}): trainings of unequal length are compared."
    )
    return NextRun(action="steps", ranks=ranks, steps=steps, trials=trials, sentence=sentence)


def _extend(evidence: Evidence) -> NextRun:
    top = evidence.reference
    rate = top.learning_rate
    lrs = [_beyond(rate, EDGE_FACTOR * rate, _known_rates(evidence.table)), rate] if rate > 0 else []
    trials = len(lrs) or 1
    at = f" at learning rates {' and '.join(f'{lr:.2g}' for lr in lrs)}" if lrs else ""
    sentence = f"Train rank {2 * top.rank}{at} ({_cost(trials)}), or accept a larger margin."
    return NextRun(action="rank", ranks=[2 * top.rank], learning_rates=lrs, trials=trials, sentence=sentence)


def _beyond_the_edge(tested: Comparison) -> NextRun:
    evidence, ranks = tested.evidence, sorted({tested.chosen, tested.reference.rank})
    rank = next(rank for rank in ranks if evidence.is_at_edge(rank))
    run = run_beyond_the_edge(evidence.table, rank, evidence.contenders[rank].learning_rate, ranks)
    assert run is not None
    return run


def run_beyond_the_edge(table: ScoreTable, rank: int, learning_rate: float, ranks: list[int]) -> NextRun | None:
    """Return the run of `ranks` at the learning rate beyond the rank's best one; None where that is inside those tried."""
    rates = table.rates_ending_at(learning_rate, rank)
    if not rates:
        return None
    edge, inner = (rates[0], rates[1]) if learning_rate == rates[0] else (rates[-1], rates[-2])
    lr = _beyond(edge, inner, _known_rates(table))
    sentence = (
        f"The best learning rate of rank {rank} is at the edge of those tried: train {_ranks(ranks)} at {lr:.2g} too "
        f"({_cost(len(ranks))})."
    )
    return NextRun(action="rates", ranks=ranks, learning_rates=[lr], trials=len(ranks), sentence=sentence)


def _known_rates(table: ScoreTable) -> set[float]:
    return {rate for rank in table.ranks() for rate in table.tried_learning_rates(rank)}


def _beyond(edge: float, inner: float, known: Iterable[float]) -> float:
    """Outward by the last step inward: a rate of another rank where one is near, else a round number where that is a step too."""
    if edge == 0 or inner == 0:
        return edge * EDGE_FACTOR or inner / EDGE_FACTOR
    factor = edge / inner
    lr = edge * factor
    for near in (*sorted(known), float(f"{lr:.0e}")):
        if near and abs(math.log(near / lr)) < abs(math.log(factor)) / 4:
            return near
    return lr


def _prove(tested: Comparison) -> NextRun:
    """The seeds that are expected to show what a point reading suggests."""
    reference = tested.reference.rank
    rank = tested.chosen if tested.chosen != reference else tested.next_lower or reference
    difference = tested.by_rank[rank].difference
    needed = seeds_needed(difference, tested.margin) if difference.variance > 0 else None
    ranks = sorted({rank, reference})
    if needed is None:
        sentence = (
            f"One number per rank can't show it: score {_ranks(ranks)} by example, with {CONFIRM_SEEDS} seeds or more."
        )
        return NextRun(action="items", ranks=ranks, seeds=CONFIRM_SEEDS, sentence=sentence)
    sentence = f"Train {_ranks(ranks)} with {needed} seeds each to show it ({{cost}})."
    return _train_seeds(tested.evidence, ranks, needed, sentence)


def _confirm(tested: Comparison) -> NextRun:
    """`CONFIRM_SEEDS` paired seeds at the answer, the next lower rank and the reference."""
    ranks = sorted({tested.chosen, tested.reference.rank, tested.next_lower or tested.chosen})
    if _missing(tested.evidence, ranks, CONFIRM_SEEDS) == 0:
        sentence = f"No further training is needed: evaluate {_ranks(ranks)} once on held-out data that no choice was based on."
        return NextRun(action="test", ranks=ranks, sentence=sentence)
    sentence = f"Train {_ranks(ranks)} with {CONFIRM_SEEDS} seeds to confirm it ({{cost}})."
    return _train_seeds(tested.evidence, ranks, CONFIRM_SEEDS, sentence)


def _after_no_gain(evidence: Evidence) -> NextRun:
    lr = 3 * max(contender.learning_rate for contender in evidence.contenders.values())
    at = f" at learning rate {lr:.2g}" if lr > 0 else " at a higher learning rate"
    sentence = f"Check that the labels match the data; then train once{at}, or longer, before giving up."
    lrs = [lr] if lr > 0 else []
    return NextRun(action="data", ranks=[min(evidence.contenders)], learning_rates=lrs, trials=1, sentence=sentence)


def _missing(evidence: Evidence, ranks: list[int], seeds: int) -> int:
    """The further trainings with which each of the ranks has `seeds` seeds."""
    return sum(max(0, seeds - len(evidence.contenders[rank].cells)) for rank in ranks)


def _train_seeds(
    evidence: Evidence, ranks: list[int], seeds: int, sentence: str, examples: int | None = None
) -> NextRun:
    """Each of the ranks with `seeds` seeds; the sentence has `{cost}` for the trainings that this takes."""
    trials = _missing(evidence, ranks, seeds)
    return NextRun(
        action="seeds",
        ranks=ranks,
        seeds=seeds,
        items=examples,
        trials=trials,
        sentence=sentence.format(cost=_cost(trials)),
    )


def _cost(trials: int) -> str:
    return "1 training" if trials == 1 else f"{trials} trainings"


def _name(rank: int) -> str:
    return "the base" if rank == 0 else f"rank {rank}"


def _ranks(ranks: list[int]) -> str:
    """`ranks 4 and 64`, `the base and rank 4`."""
    return " and ".join(_name(rank) for rank in ranks) if 0 in ranks else names(ranks)


def next_commands(
    started: RunStarted, runs: Sequence[NextRun], run: str, margin: float | None = None
) -> list[str | None]:
    """Return the command of each next run, or None if options of `select` can't express it.

    `margin` is one that is not the run's own: part of the command, so that the continued run answers at this margin.
    """
    if started.is_own:
        return [None] * len(runs)
    further = [] if margin is None else ["--margin", f"{margin:g}"]
    return [
        shlex.join(["rightrank", "select", "--out", run, *options, *further]) if options else None
        for options in (_further_options(started, wanted) for wanted in runs)
    ]


def _further_options(started: RunStarted, wanted: NextRun) -> list[str]:
    settings, options = started.select_settings, list[str]()
    held_out = len(started.evaluation_items) + started.data.not_evaluated  # at most so many examples can be evaluated
    is_grouped = started.data.groups > 0  # further rows need not be of further groups
    if wanted.items is not None and not is_grouped and len(started.evaluation_items) < wanted.items <= held_out:
        options += ["--eval-items", str(wanted.items)]
    ranks, rates, seeds = settings.ranks, settings.learning_rates, settings.seeds
    if wanted.action == "seeds" and wanted.seeds is not None:
        further = (seed for seed in range(MAX_SEED) if seed not in seeds)
        options += _with_added("--seeds", seeds, [*seeds, *islice(further, wanted.seeds - len(seeds))])
    if wanted.action == "rank":
        options += _with_added("--ranks", ranks, [*ranks, *wanted.ranks])
    if wanted.action in ("rank", "rates"):
        options += _with_added("--learning-rates", rates, [*rates, *wanted.learning_rates])
    return options


def _with_added(option: str, before: Sequence[float], after: Sequence[float]) -> list[str]:
    """The option with all values; empty where nothing is added."""
    added = sorted(set(after))
    return [option, ",".join(f"{value:g}" for value in added)] if set(after) > set(before) else []
