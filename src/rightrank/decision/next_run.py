"""The run that would settle the answer, by a power calculation on the parts of the variance measured so far.

A run is said to settle it when, at the difference seen so far, it would do so four times in five. The difference
itself is uncertain, so this is a plan, not a promise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from rightrank.decision.evidence import Evidence
from rightrank.decision.judge import CONFIDENCE, REFUTED, Judged
from rightrank.decision.verdicts import contested_rank, open_rival, read_off, underpowered
from rightrank.maths.intervals import Estimate, normal_quantile
from rightrank.records import NextRun, Verdict

POWER = 0.8
MOST_SEEDS = 32
MOST_ITEM_GROWTH = 64
CHEAP_ITEM_GROWTH = 24  # so many times the items cost less than further trainings, as a rule
CONFIRM_SEEDS = 3
FURTHER = 3  # times the best rate, where no other tells the step


def next_runs(
    judged: dict[int, Judged], evidence: Evidence, chosen: int, margin: float, verdict: Verdict, flags: list[str]
) -> list[NextRun]:
    """What to do next, the most useful first; never empty."""
    runs: list[NextRun] = []
    if verdict == "no_gain":
        runs.append(_after_no_gain(evidence))
    elif verdict == "undecided":
        contested = contested_rank(judged, evidence, chosen)
        if contested is not None:
            runs.extend(_settle(contested, judged[contested].difference, evidence, chosen, margin))
        else:
            rival = open_rival(judged, evidence, margin)
            assert rival is not None
            # whether the reference is worse than the rival by the margin: the same question from the other side
            runs.extend(_settle(rival, judged[rival].difference.reversed(), evidence, chosen, margin))
    elif verdict == "rising":
        runs.append(_extend(evidence))
    if "lr_edge" in flags:
        runs.insert(1 if verdict in ("rising", "undecided") else 0, _beyond_the_edge(evidence, chosen))
    if verdict not in ("no_gain", "undecided"):
        if read_off(evidence) and underpowered(judged, evidence, chosen, verdict):
            runs.append(_prove(judged, evidence, chosen, margin))
        else:
            runs.append(_confirm(evidence, chosen))
    return runs


def seeds_needed(estimate: Estimate, margin: float) -> int | None:
    """The fewest seeds at which the difference would be settled; None if 32 don't do."""
    return _least(range(estimate.seeds + 1, MOST_SEEDS + 1), lambda n: settles(estimate.at(estimate.items, n), margin))


def items_needed(estimate: Estimate, margin: float) -> int | None:
    """The fewest held-out items, to two digits; None if 64 times as many don't do, or items weren't scored."""
    if estimate.items < 2:
        return None
    growth = (1.15**power for power in range(1, 31))
    sizes = (_rounded(estimate.items * factor) for factor in growth if factor <= MOST_ITEM_GROWTH)
    return _least(sizes, lambda n: settles(estimate.at(n, estimate.seeds), margin))


def settles(estimate: Estimate, margin: float) -> bool:
    """Whether four in five such runs would show it, or refute it, if the mean is as estimated."""
    error = estimate.standard_error
    if estimate.mean < margin:
        return estimate.bound(CONFIDENCE) + normal_quantile(POWER) * error < margin
    return estimate.bound(1 - REFUTED) - normal_quantile(POWER) * error > margin


def _least(sizes: Iterable[int], enough: Callable[[int], bool]) -> int | None:
    return next((size for size in sizes if enough(size)), None)


def _rounded(number: float) -> int:
    """Up, to two digits."""
    step = 10 ** max(0, math.floor(math.log10(number)) - 1)
    return int(math.ceil(number / step) * step)


def _settle(rank: int, estimate: Estimate, evidence: Evidence, chosen: int, margin: float) -> list[NextRun]:
    """More items or more seeds at the contested rank and the reference; or the honest way out."""
    reference = evidence.reference
    ranks = sorted({rank, reference.rank} - {0})
    names = _ranks(sorted({rank, reference.rank}))
    runs = []
    items = items_needed(estimate, margin)
    if items is not None:
        sentence = f"Score about {items:,} held-out items (now {estimate.items:,}) at {names}: expected to settle it."
        runs.append(NextRun(action="items", ranks=ranks, items=items, sentence=sentence))
    seeds = seeds_needed(estimate, margin)
    if seeds is not None:
        trials = len(ranks) * (seeds - estimate.seeds)
        seconds = _seconds(evidence, ranks, seeds - estimate.seeds)
        sentence = (
            f"Train {names} with {seeds} seeds in all (now {estimate.seeds}): expected to settle it, "
            f"{_cost(trials, seconds)}."
        )
        runs.append(
            NextRun(action="seeds", ranks=ranks, seeds=seeds, trials=trials, seconds=seconds, sentence=sentence)
        )
    if items is not None and seeds is not None and items > CHEAP_ITEM_GROWTH * estimate.items:
        runs.reverse()
    if not runs:
        runs.append(_no_size_will_do(rank, chosen, estimate))
    return runs


def _no_size_will_do(rank: int, chosen: int, estimate: Estimate) -> NextRun:
    both = f"{MOST_SEEDS} seeds" + (f" nor {MOST_ITEM_GROWTH} times the items" if estimate.items else "")
    sentence = (
        f"Neither {both} would settle {_name(rank)} at this noise: take rank {chosen}, or choose another margin."
        if estimate.items
        else f"Even {both} would not settle {_name(rank)} at this noise: take rank {chosen}, or choose another margin."
    )
    return NextRun(action="none", ranks=[chosen], sentence=sentence)


def _extend(evidence: Evidence) -> NextRun:
    top = evidence.reference
    rates = sorted({top.rate, top.rate / 3} - {0.0})
    seconds = _seconds(evidence, [top.rank], len(rates) or 1)
    trials = len(rates) or 1
    at = f" at learning rates {' and '.join(f'{rate:.2g}' for rate in rates)}" if rates else ""
    sentence = f"Train rank {2 * top.rank}{at} ({_cost(trials, seconds)}), or accept a larger margin."
    return NextRun(
        action="rank", ranks=[2 * top.rank], learning_rates=rates, trials=trials, seconds=seconds, sentence=sentence
    )


def _beyond_the_edge(evidence: Evidence, chosen: int) -> NextRun:
    ranks = sorted({chosen, evidence.reference.rank})
    rank = next(rank for rank in ranks if _edge_rate(evidence, rank) is not None)
    rate = _edge_rate(evidence, rank)
    assert rate is not None
    seconds = _seconds(evidence, ranks, 1)
    sentence = (
        f"The best learning rate of rank {rank} is the last one tried: train {_ranks(ranks)} at {rate:.2g} too "
        f"({_cost(len(ranks), seconds)})."
    )
    return NextRun(
        action="rates", ranks=ranks, learning_rates=[rate], trials=len(ranks), seconds=seconds, sentence=sentence
    )


def _edge_rate(evidence: Evidence, rank: int) -> float | None:
    """The next rate outward, as far as the last step inward; None where the best is inside."""
    rates, best = evidence.table.rates(rank), evidence.contenders[rank].rate
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    if best == rates[0]:
        return rates[0] ** 2 / rates[1]
    return rates[-1] ** 2 / rates[-2] if rates[-2] > 0 else FURTHER * rates[-1]


def _prove(judged: dict[int, Judged], evidence: Evidence, chosen: int, margin: float) -> NextRun:
    """How many seeds would show what was only read off."""
    reference = evidence.reference.rank
    below = max((rank for rank in evidence.contenders if rank < chosen), default=chosen)
    rank = chosen if chosen != reference else below
    needed = seeds_needed(judged[rank].difference, margin) if rank != reference else None
    ranks = sorted({rank, reference})
    if needed is None:
        sentence = f"One number a rank can't show it: score {_ranks(ranks)} item by item, with three seeds or more."
        return NextRun(action="items", ranks=ranks, seeds=CONFIRM_SEEDS, sentence=sentence)
    trials = len(ranks) * (needed - 1)
    seconds = _seconds(evidence, ranks, needed - 1)
    sentence = f"Train {_ranks(ranks)} with {needed} seeds each to show it ({_cost(trials, seconds)})."
    return NextRun(action="seeds", ranks=ranks, seeds=needed, trials=trials, seconds=seconds, sentence=sentence)


def _confirm(evidence: Evidence, chosen: int) -> NextRun:
    """Three paired seeds at the answer, the next lower rank and the reference."""
    below = [max((rank for rank in evidence.contenders if rank < chosen), default=chosen)]
    ranks = sorted({chosen, evidence.reference.rank, *below})
    missing = sum(max(0, CONFIRM_SEEDS - len(evidence.contenders[rank].cells)) for rank in ranks)
    if missing == 0:
        sentence = f"Nothing is open; measure {_ranks(ranks)} once on held-out data that no choice has seen."
        return NextRun(action="test", ranks=ranks, sentence=sentence)
    seconds = _seconds(evidence, ranks, missing / len(ranks))
    sentence = f"{CONFIRM_SEEDS} seeds at {_ranks(ranks)} would confirm it ({_cost(missing, seconds)})."
    return NextRun(action="seeds", ranks=ranks, seeds=CONFIRM_SEEDS, trials=missing, seconds=seconds, sentence=sentence)


def _after_no_gain(evidence: Evidence) -> NextRun:
    rate = max(contender.rate for contender in evidence.contenders.values())
    rates = [3 * rate] if rate > 0 else []
    at = f" at learning rate {3 * rate:.2g}" if rates else " at a higher learning rate"
    sentence = f"Check that data and labels belong together; then train once{at}, or longer, before giving up."
    rank = min(evidence.contenders)
    return NextRun(action="data", ranks=[rank], learning_rates=rates, trials=1, sentence=sentence)


def _seconds(evidence: Evidence, ranks: list[int], times: float) -> float | None:
    """Of so many more trainings of each rank, at the pace so far."""
    total = 0.0
    for rank in ranks:
        known = [cell.seconds for cell in evidence.contenders[rank].cells.values() if cell.seconds is not None]
        if not known:
            return None
        total += times * sum(known) / len(known)
    return total


def _cost(trials: int, seconds: float | None) -> str:
    count = "1 training" if trials == 1 else f"{trials} trainings"
    if seconds is None:
        return count
    if seconds < 120:
        return f"{count}, about {seconds:.0f} s"
    return f"{count}, about {seconds / 60:.0f} min" if seconds < 7200 else f"{count}, about {seconds / 3600:.1f} h"


def _name(rank: int) -> str:
    return "the base" if rank == 0 else f"rank {rank}"


def _ranks(ranks: list[int]) -> str:
    """`ranks 4 and 64`, `the base and rank 4`."""
    if 0 in ranks:
        return " and ".join(_name(rank) for rank in ranks)
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(str(rank) for rank in ranks[:-1])} and {ranks[-1]}"
