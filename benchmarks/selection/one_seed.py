"""How probable is it that a rank is enough, from one seed? Predicted, and checked on further seeds of open grids.

    python -m benchmarks.selection.one_seed --public FOLDER_OF_SWEEPS --out benchmarks/selection/one_seed.json

A rank is *enough* on a further seed where its loss is within the margin of the best rank's, all trained with that seed at the learning
rates that were best on the first. Of two ranks, the difference on a further seed is predicted as

    difference seen + σ · t,    σ = c · Π feature^exponent (the exponents add up to 1)

with Student's t of few degrees. The probability that a rank is enough is the smallest over the other ranks of the probability
that it is worse than that one by at most the margin. c and the exponents are fitted on all sources but the one that is
predicted: a source is a task with its models and horizons, and the planted teachers are one. Sources have equal weights, in
the fit and in the tables.

    spread        standard deviation between examples of the paired difference
    learned       the base's loss minus the reference's
    difference    the size of the difference seen
    ranks         the median difference between neighbouring ranks
    looks         how much the difference moved between a quarter, half and the end
    truncation    the top truncated to the rank, minus the training at it
    means         the running mean's loss minus the current weights', at an eighth

Public sweeps (`--public`) fit nothing. They store no examples; there the spread is that of independent answers.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, pairwise, permutations, product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import t as student

from benchmarks.decide.seed_coverage import _grid, source_of, stored_grids
from benchmarks.machine import machine
from benchmarks.selection import locks
from benchmarks.selection.compare import FAMILIES, curves_of
from benchmarks.selection.tables import replay, space_of_grid
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import decision_of
from rightrank.decision.seeds import pair_noise
from rightrank.decision.table import Contender, ScoreTable, table_of
from rightrank.schema.trials import Floats
from rightrank.search import STRATEGIES

HERE = Path(__file__).parent
FILES = ("real_grids.json", "seeded_short_grids.json", "seeded_grids.json", "grids/*.json")
MARGINS = {"planted": (0.002, 0.005, 0.02), "short": (0.005, 0.01, 0.02), "long": (0.005, 0.02, 0.05)}
SWEEPS = ("silversuncn_glue", "nayyirahsan_threshold", "gradience_sst2")  # with several seeds
PUBLIC_MARGINS = (0.005, 0.01, 0.02)  # of accuracy
CHOSEN, DEGREES = ("spread",), 2.0
OTHER_DEGREES = (1.5, 3.0, 5.0, 30.0)
MODELS: tuple[tuple[str, ...], ...] = (
    (),
    ("learned",),
    ("difference",),
    ("ranks",),
    CHOSEN,
    ("spread", "learned"),
    ("spread", "difference"),
    ("spread", "ranks"),
)
WITHIN_A_TRAINING = (CHOSEN, ("looks",), ("spread", "looks"), ("truncation",), ("spread", "truncation"), ("means",))
EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
CONFIDENCES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
RESAMPLES = 200  # of grids
LONG = 400  # steps
FLOOR = 1e-3  # of what was learned: no feature is below it
PULL = 0.02  # of the exponents towards each other, in nats


@dataclass(frozen=True)
class Pair:
    """One rank against the reference of one seed."""

    source: str
    family: str
    grid: str
    difference: float  # as the decision has it: without the winner's curse of the learning rate
    features: dict[str, float]
    further: tuple[float, ...]  # what the same pair shows on each further seed


@dataclass(frozen=True)
class Seen:
    """What one seed of a grid shows. Losses: lower is better, each rank at its best learning rate."""

    source: str
    family: str
    grid: str
    reference: int
    losses: dict[int, float]
    spreads: dict[tuple[int, int], float]  # of the paired difference of two ranks
    examples: int
    pairs: tuple[Pair, ...]
    further: tuple[dict[int, float], ...]  # by further seed, at the same learning rates
    others: dict[int, float]  # the mean of the further seeds at the best learning rates over them: the truth
    rule: dict[float, int]  # margin → the rank of the present answer


Forecast = Callable[[Seen, int, float], float]  # that the rank is enough at the margin


Row = tuple[str, str, dict[str, Any], dict[str, Any]]


def curves() -> Iterator[Row]:
    """Source, family, the grid in the form of `seed_coverage`, and what else its file says; with examples and two seeds or more."""
    bases = {
        curve["id"]: curve["base"]
        for name in ("planted_grids.json", "planted_new_grids.json")
        for curve in json.loads((HERE / name).read_text())["curves"]
    }
    for name, grid in stored_grids().items():
        if grid["family"] == "planted":
            yield "planted", "planted", grid | {"name": name}, {"base": bases[name]}
    yield from curves_in(sorted(path for pattern in FILES for path in HERE.glob(pattern)))


def curves_in(files: Sequence[Path]) -> Iterator[Row]:
    stored = {curve["id"]: curve for file in files for curve in json.loads(file.read_text())["curves"]}  # the later one
    for name, curve in stored.items():
        cells = [
            [int(rank), float(rate), int(seed), scores]
            for rank, by_rate in curve.get("item_losses", {}).items()
            for rate, by_seed in by_rate.items()
            for seed, scores in by_seed.items()
        ]
        if len({cell[2] for cell in cells}) > 1:
            source = "senses_few" if name.startswith("senses_few") else name.split("_")[0]
            tokens = curve["item_tokens"] or [1] * len(cells[0][3])
            metric = curve.get("metric") or "loss"
            found = _grid("real", source, metric, curve.get("steps", 0), tokens, cells) | {"name": name}
            yield source, "long" if curve.get("steps", 0) >= LONG else "short", found, curve


def every_seed(rows: Iterable[Row]) -> list[Seen]:
    """Each seed of each grid in turn as the one that is seen."""
    found = []
    for source, family, grid, curve in rows:
        table = source_of(grid["name"], grid)
        sign = -1.0 if grid["metric"] == "accuracy" else 1.0
        for seed in table.seeds:
            evidence = Evidence(table.table((seed,)))
            contenders, reference = evidence.contenders, evidence.reference
            rates = {rank: one.learning_rate for rank, one in contenders.items()}
            rest = tuple(other for other in table.seeds if other != seed)
            further = [
                {rank: table.cells[rank, lr, other].loss for rank, lr in rates.items()}
                for other in rest
                if all((rank, lr, other) in table.cells for rank, lr in rates.items())
            ]
            spreads = {(a, b): spread(contenders[a], contenders[b]) for a, b in permutations(contenders, 2)}
            ordered = [contenders[rank].loss for rank in sorted(contenders)]
            shared = {
                "learned": sign * curve["base"] - reference.loss,
                "ranks": float(np.median(np.abs(np.diff(ordered)))),
            }
            pairs = []
            for rank, one in contenders.items():
                if rank == reference.rank or not further:
                    continue
                difference = one.fair_loss - reference.fair_loss
                features = shared | {"spread": spreads[rank, reference.rank], "difference": abs(difference)}
                features |= within_a_training(partial(cell, curve, seed, sign), one, reference, difference)
                shown = tuple(losses[rank] - losses[reference.rank] for losses in further)
                pairs.append(Pair(source, family, grid["name"], difference, features, shown))
            truth = Evidence(table.table(rest)).contenders
            found.append(
                Seen(
                    source,
                    family,
                    grid["name"],
                    reference.rank,
                    {rank: one.fair_loss for rank, one in contenders.items()},
                    spreads,
                    len(grid["cells"][0][3]),
                    tuple(pairs),
                    tuple(further),
                    {rank: one.fair_loss for rank, one in truth.items()},
                    {margin: at_hand(table.table((seed,)), margin) for margin in MARGINS[family]},
                )
            )
    return found


def at_hand(table: ScoreTable, margin: float) -> int:
    """The rank of the rule: the answer, else what was shown to be enough, else the best so far."""
    decision = decision_of(table, margin, confidence=None)
    named = (decision.rank, decision.fallback_rank, decision.best_so_far)
    return next(rank for rank in named if rank is not None)


def spread(one: Contender, other: Contender) -> float:
    (seed,) = one.cells
    ours, theirs = one.cells[seed], other.cells[seed]
    return math.sqrt(pair_noise((ours.sums - theirs.sums)[None, :], ours.weights).spread)


def cell(curve: dict[str, Any], seed: int, sign: float, part: Sequence[str], one: tuple[int, float]) -> float | None:
    found: Any = curve
    for key in (*part, str(one[0]), f"{one[1]:g}", str(seed)):
        found = found.get(key) if isinstance(found, dict) else None
    return None if found is None else sign * float(found)


def within_a_training(
    at: Callable[..., float | None], contender: Contender, reference: Contender, end: float
) -> dict[str, float]:
    """The features of looks, of the truncation and of running means, where the grid has them."""
    found = {}
    one, best = ((contender.rank, contender.learning_rate), (reference.rank, reference.learning_rate))
    path = [(at(("checkpoints", part), one), at(("checkpoints", part), best)) for part in ("0.25", "0.5")]
    if all(a is not None and b is not None for a, b in path):
        moved = np.diff([*(a - b for a, b in path if a is not None and b is not None), end])
        found["looks"] = float(np.sqrt(np.mean(moved**2)))
    cut, trained = at(("truncation_grid",), (one[0], best[1])), at(("seed_grid",), one)
    look, mean = at(("checkpoints", "0.125"), one), at(("averaged", "0.125"), one)
    if cut is not None and trained is not None:
        found["truncation"] = abs(cut - trained)
    if look is not None and mean is not None:
        found["means"] = abs(look - mean)
    return found


def arrays(pairs: Sequence[Pair], names: Sequence[str]) -> tuple[Floats, Floats, Floats]:
    """Of every pair and further seed: [events, 1 + features] logarithms, [events] errors, and [events] weights."""
    events = [(pair, shown - pair.difference) for pair in pairs for shown in pair.further]
    logs = [
        [1.0, *(math.log(max(p.features[name], FLOOR * abs(p.features["learned"]), 1e-9)) for name in names)]
        for p, _ in events
    ]
    count: dict[str, int] = {}
    for pair, _ in events:
        count[pair.source] = count.get(pair.source, 0) + 1
    weights = np.array([1 / count[pair.source] for pair, _ in events]) / len(count)
    return np.array(logs), np.array([error for _, error in events]), weights


def fit(pairs: Sequence[Pair], names: Sequence[str], degrees: float) -> Floats:
    """[1 + features]: log c, and the exponents."""
    logs, errors, weights = arrays(pairs, names)

    def parameters(free: Floats) -> Floats:
        return np.array([*free, 1 - free[1:].sum()]) if names else free

    def loss(free: Floats) -> float:
        scale = logs @ parameters(free)
        fits = student.logpdf(errors / np.exp(scale), degrees) - scale
        return float(-(weights * fits).sum() + PULL * ((free[1:] - 1 / max(len(names), 1)) ** 2).sum())

    start = np.array([-2.0, *[1 / len(names)] * (len(names) - 1)]) if names else np.array([-4.0])
    return parameters(minimize(loss, start, method="BFGS").x)


def left_out(pairs: Sequence[Pair], names: Sequence[str], degrees: float) -> dict[str, Floats]:
    """Source → what the other sources fit."""
    sources = sorted({pair.source for pair in pairs})
    return {source: fit([pair for pair in pairs if pair.source != source], names, degrees) for source in sources}


def scores(pairs: Sequence[Pair], names: Sequence[str], degrees: float) -> dict[str, Any]:
    """Leaving out each source: the mean log density of further seeds' differences, and the Brier score of "within the margin"."""
    densities, briers = [], []
    for source, found in left_out(pairs, names, degrees).items():
        own = [pair for pair in pairs if pair.source == source]
        logs, errors, _ = arrays(own, names)
        scale = logs @ found
        learned = np.log([abs(pair.features["learned"]) for pair in own for _ in pair.further])
        densities.append(float(np.mean(student.logpdf(errors / np.exp(scale), degrees) - scale + learned)))
        briers.append(
            float(
                np.mean(
                    [
                        (student.cdf((margin - pair.difference) / sigma, degrees) - (shown <= margin)) ** 2
                        for pair in own
                        for sigma in [math.exp(float(arrays([pair], names)[0][0] @ found))]
                        for margin in MARGINS[pair.family]
                        for shown in pair.further
                    ]
                )
            )
        )
    return {
        "features": list(names),
        "degrees": degrees,
        "log score": round(float(np.mean(densities)), 3),
        "brier": round(float(np.mean(briers)), 4),
        "fitted on all": [round(float(value), 3) for value in fit(pairs, names, degrees)],
    }


def probability(seen: Seen, rank: int, margin: float, ratio: float) -> float:
    """That `rank` is enough: the smallest over the other ranks of being worse than that one by at most the margin."""
    return min(
        float(student.cdf((margin - seen.losses[rank] + seen.losses[other]) / max(ratio * scale, 1e-12), DEGREES))
        for (one, other), scale in seen.spreads.items()
        if one == rank
    )


def forecasts(ratios: dict[str, float]) -> dict[str, Forecast]:
    """The probability, and what other ways of answering say: 1 for the ranks that they call enough, 0 for those below."""
    return {
        "probability": lambda seen, rank, margin: probability(seen, rank, margin, ratios[seen.source]),
        "examples alone": lambda seen, rank, margin: probability(seen, rank, margin, seen.examples**-0.5),
        "present rule": lambda seen, rank, margin: float(rank >= seen.rule[margin]),
        "whole one-seed grid": lambda seen, rank, margin: float(rank >= smallest_within(seen.losses, margin)),
        "always 16": lambda seen, rank, margin: float(rank >= 16),
    }


def smallest_within(losses: dict[int, float], margin: float) -> int:
    best = min(losses.values())
    return min(rank for rank, loss in losses.items() if loss <= best + margin + 1e-9)


@dataclass(frozen=True)
class Event:
    source: str
    family: str
    grid: str
    forecast: float
    held: bool


def events(every: Sequence[Seen], forecast: Forecast) -> list[Event]:
    return [
        Event(
            seen.source, seen.family, seen.grid, said, losses[rank] <= min(losses.values()) + margin + 1e-9
        )
        for seen in every
        for margin in MARGINS[seen.family]
        for rank in seen.losses
        for said in [forecast(seen, rank, margin)]
        for losses in seen.further
    ]  # fmt: skip


def of_two_seeds(rows: Iterable[Row]) -> list[Event]:
    """Two seeds of each grid in turn as those that are seen; the forecasts of `decide` for the seeds that are left."""
    found = []
    for source, family, grid, _ in rows:
        table = source_of(grid["name"], grid)
        for seen, margin in product(combinations(table.seeds, 2), MARGINS[family]):
            decided = [rank for rank in decision_of(table.table(seen), margin).ranks if rank.probability is not None]
            for seed in set(table.seeds) - set(seen):
                cells = {rank.rank: table.cells.get((rank.rank, rank.learning_rate or 0.0, seed)) for rank in decided}
                losses = {rank: cell.loss for rank, cell in cells.items() if cell is not None}
                if len(losses) < len(decided):
                    continue
                for rank in decided:
                    held = losses[rank.rank] <= min(losses.values()) + margin + 1e-9
                    found.append(Event(source, family, grid["name"], rank.probability or 0.0, held))
    return found


def two_seeds(rows: Iterable[Row]) -> dict[str, Any]:
    found = of_two_seeds(rows)
    by_family = {
        family: round(brier(own), 3) for family in MARGINS if (own := [e for e in found if e.family == family])
    }
    real = [event for event in found if event.family != "planted"]
    return {
        "brier": {"all": round(brier(found), 3), "interval": over_grids(found), **by_family},
        "reliability": {"all": reliability(found), "real": reliability(real)},
    }


def brier(found: Sequence[Event]) -> float:
    """The mean squared error of the forecasts: the mean over sources."""
    errors: dict[str, list[float]] = {}
    for one in found:
        errors.setdefault(one.source, []).append((one.forecast - one.held) ** 2)
    return float(np.mean([np.mean(values) for values in errors.values()]))


def over_grids(found: Sequence[Event]) -> list[float]:
    """The 95% interval of the Brier score that resamples grids."""
    by_grid: dict[str, list[Event]] = {}
    for one in found:
        by_grid.setdefault(one.grid, []).append(one)
    grids, generator = list(by_grid.values()), np.random.default_rng(0x5EED)
    draws = generator.integers(len(grids), size=(RESAMPLES, len(grids)))
    found_scores = [brier([one for place in draw for one in grids[place]]) for draw in draws]
    return [round(float(end), 3) for end in np.quantile(found_scores, (0.025, 0.975))]


def reliability(found: Sequence[Event]) -> list[dict[str, float]]:
    """By bin of the forecast: its mean, the share that held, and the events. Sources have equal weights."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.source] = counts.get(one.source, 0) + 1
    table = []
    for low, high in pairwise(EDGES):
        inside = [e for e in found if low <= e.forecast < high or e.forecast == high == 1.0]
        if inside:
            weights = [1 / counts[one.source] for one in inside]
            row = {"from": low, "to": high, "events": len(inside), "grids": len({e.grid for e in inside})}
            for name in ("forecast", "held"):
                row[name] = round(float(np.average([getattr(e, name) for e in inside], weights=weights)), 3)
            table.append(row)
    return table


def pick(seen: Seen, margin: float, confidence: float, ratios: dict[str, float]) -> int:
    """The smallest rank at the confidence; the largest where none has it."""
    found = [r for r in seen.losses if probability(seen, r, margin, ratios[seen.source]) >= confidence]
    return min(found, default=max(seen.losses))


def picks(every: Sequence[Seen], choose: Callable[[Seen, float], int]) -> dict[str, Any]:
    """Against the mean of the further seeds: too low (and worse than the margin allows), exact, and too high."""
    found: dict[str, Any] = {}
    for family, margins in MARGINS.items():
        row = dict.fromkeys(("cases", "too low", "exact", "one rank too high", "further too high"), 0)
        for seen in (one for one in every if one.family == family and one.further):
            ranks, best = sorted(seen.losses), min(seen.others.values())
            for margin in margins:
                chosen = choose(seen, margin)
                off = ranks.index(chosen) - ranks.index(smallest_within(seen.others, margin))
                row["cases"] += 1
                row["too low"] += off < 0 and seen.others[chosen] > best + margin + 1e-9
                row["exact"] += off == 0
                row["one rank too high"] += off == 1
                row["further too high"] += off > 1
        found[family] = row
    return found


def all_picks(every: Sequence[Seen], ratios: dict[str, float]) -> dict[str, Any]:
    """What each confidence picks, the rule, a whole grid of the seed, and always 16."""
    found = {f"at {c:g}": picks(every, lambda seen, m, c=c: pick(seen, m, c, ratios)) for c in CONFIDENCES}
    return found | {
        "present rule": picks(every, lambda seen, margin: seen.rule[margin]),
        "whole one-seed grid": picks(every, lambda seen, margin: smallest_within(seen.losses, margin)),
        "always 16": picks(every, lambda seen, margin: 16),
    }


def picks_after_bracket(families: Sequence[str]) -> dict[str, Any]:
    """What `decide` says of the trainings that `bracket` runs, with one seed and with two, against the mean of all seeds of the grid.

    Where it is undecided, the rank that it falls back to is counted.
    """
    found: dict[str, Any] = {}
    answers = ("undecided", "too low", "exact", "one rank too high", "further too high")
    for family in families:
        rows: dict[str, dict[str, int]] = {}
        for curve, margin, seeds in product(curves_of(family), FAMILIES[family][2], (1, 2)):
            space = space_of_grid(curve, margin, seeds)
            direct = [o for o in replay(curve, STRATEGIES["bracket"], space).outcomes if o.rank > 0 and o.arm.is_direct]
            table = table_of(direct, curve.metric, curve.higher_is_better)
            best, truth = min(map(curve.best, curve.ranks)), curve.ranks.index(curve.truth(margin))
            for confidence in (None, *CONFIDENCES) if seeds == 1 else (None,):
                decision = decision_of(table, margin, confidence=confidence)
                largest = None if confidence is None else table.ranks()[-1]
                named = (decision.rank, largest, decision.fallback_rank, decision.best_so_far)
                chosen = next(rank for rank in named if rank is not None)
                off = curve.ranks.index(chosen) - truth
                name = "two seeds" if seeds == 2 else "present rule" if confidence is None else f"at {confidence:g}"
                row = rows.setdefault(name, dict.fromkeys(("cases", *answers), 0))
                row["cases"] += 1
                row["undecided"] += decision.rank is None
                row["too low"] += off < 0 and curve.best(chosen) > best + margin + 1e-9
                row["exact"] += off == 0
                row["one rank too high"] += off == 1
                row["further too high"] += off > 1
        found[family] = rows
    return found


def public(folder: Path, ratio: float) -> dict[str, Any]:
    """Accuracies of public sweeps with several seeds; two ranks' answers are taken as independent."""
    result = {}
    for name in SWEEPS:
        found, sixteen = [], []
        for curve in json.loads((folder / f"{name}.json").read_text())["curves"]:
            grid = curve["seed_grid"] if curve["higher_is_better"] else curve["metrics"]["accuracy"]["seed_grid"]
            most = {int(rank): max(by_rate.values(), key=len) for rank, by_rate in grid.items()}
            seeds = sorted(set.intersection(*(set(by_seed) for by_seed in most.values())))
            for seed in seeds if len(seeds) > 1 else ():
                wrong = {rank: 1 - by_seed[seed] for rank, by_seed in most.items()}
                spreads = {
                    (a, b): math.sqrt(wrong[a] * (1 - wrong[a]) + wrong[b] * (1 - wrong[b]))
                    for a, b in permutations(wrong, 2)
                }
                shown = tuple({r: 1 - most[r][other] for r in most} for other in seeds if other != seed)
                seen = Seen(name, "", curve["id"], 0, wrong, spreads, 0, (), shown, {}, {})
                for margin in PUBLIC_MARGINS:
                    for rank in wrong:
                        said = probability(seen, rank, margin, ratio)
                        for losses in shown:
                            held = losses[rank] <= min(losses.values()) + margin + 1e-9
                            found.append(Event(name, "", curve["id"], said, held))
                            sixteen.append(Event(name, "", curve["id"], float(rank >= 16), held))
        share = float(np.mean([one.held for one in found]))
        result[name] = {
            "grids": len({one.grid for one in found}),
            "brier": round(brier(found), 3),
            "always the share that held": round(share * (1 - share), 3),
            "always 16": round(brier(sixteen), 3),
            "reliability": reliability(found),
        }
    return result


def draw(tables: dict[str, list[dict[str, float]]], path: Path) -> None:
    """The reliability diagram: forecast against the share that held."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4.6, 4.4))
    axis.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    for (name, rows), marker in zip(tables.items(), "os^", strict=False):
        axis.plot([row["forecast"] for row in rows], [row["held"] for row in rows], marker=marker, label=name)
    axis.set_xlabel("probability that the rank is enough")
    axis.set_ylabel("share of further seeds in which it was")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def study(sweeps: Path | None) -> dict[str, Any]:
    every = every_seed(curves())
    pairs = [pair for seen in every for pair in seen.pairs]
    subset = [pair for pair in pairs if {"looks", "truncation", "means"} <= pair.features.keys()]
    fits = left_out(pairs, CHOSEN, DEGREES)
    ratios = {source: math.exp(found[0]) for source, found in fits.items()}
    result: dict[str, Any] = {
        "machine": machine(),
        "sources": {
            source: {
                "grids": len({pair.grid for pair in pairs if pair.source == source}),
                "pairs and further seeds": sum(len(pair.further) for pair in pairs if pair.source == source),
                "ratio that the others fit": round(ratio, 3),
                "its own ratio": round(math.exp(fit([p for p in pairs if p.source == source], CHOSEN, DEGREES)[0]), 3),
            }
            for source, ratio in ratios.items()
        },
        "ratio": round(math.exp(fit(pairs, CHOSEN, DEGREES)[0]), 4),
        "models": [scores(pairs, names, DEGREES) for names in MODELS]
        + [scores(pairs, CHOSEN, degrees) for degrees in OTHER_DEGREES],
        "within a training": [scores(subset, names, DEGREES) for names in WITHIN_A_TRAINING],
        "brier": {},
        "reliability": {},
        "picks": all_picks(every, ratios),
    }
    for name, forecast in forecasts(ratios).items():
        found = events(every, forecast)
        by_family = {family: round(brier([e for e in found if e.family == family]), 3) for family in MARGINS}
        result["brier"][name] = {"all": round(brier(found), 3), "interval": over_grids(found), **by_family}
        if name in ("probability", "examples alone"):
            real = [one for one in found if one.family != "planted"]
            result["reliability"][name] = {"all": reliability(found), "real": reliability(real)}
    result["picks after bracket"] = picks_after_bracket(("real, short", "real, 400 steps"))
    result["two seeds"] = two_seeds(curves())
    result["two seeds, locked"] = two_seeds(curves_in(locks.files()))
    if sweeps is not None:
        result["public"] = public(sweeps, result["ratio"])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--public", type=Path, help="folder of the public sweeps")
    parser.add_argument("--out", type=Path, default=HERE / "one_seed.json")
    options = parser.parse_args()
    result = study(options.public)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    tables = {"probability": result["reliability"]["probability"]["all"]}
    tables |= {"the same, real grids": result["reliability"]["probability"]["real"]}
    tables |= {"examples alone": result["reliability"]["examples alone"]["all"]}
    draw(tables, options.out.with_name("one_seed_reliability.svg"))
    print(json.dumps({key: value for key, value in result.items() if key != "machine"}, indent=1))


if __name__ == "__main__":
    main()
