"""Does the interval hold what a further seed shows? Grids of real trainings with two seeds or more.

    python -m benchmarks.decide.seed_coverage    # judges, and writes seed_coverage.json

`seed_grids.json.xz` has grids of run folders, accuracies on GLUE (github.com/silversuncn/lora-rank-scaling, MIT: 50 to 5,000 training examples,
six ranks, five seeds, one number a training), and planted teachers with five seeds.

A decision is made from some seeds of a grid, each rank at its best learning rate on them. For every rank below or above the
reference, the interval is compared with the paired difference of a seed that the decision has not seen, at the same
learning rates and on the same held-out examples. Every choice of seeds is tried.

    before      one seed: other examples and the published .0003 nats; more: the seed noise pooled over ranks
    own         the rank's own variance over seeds alone, Student's t
    pooled      the ratio of seed noise to the spread between examples, pooled over the ranks at hand
    expected    the ratio of earlier grids alone (`NOISE`), nothing measured
    after       what the decision gives as `further_seed_low` and `further_seed_high`

Before and own are also widened for the further seed's own noise where they know any. Shares are given with the number of
differences and a 95% interval that resamples whole grids, since the differences of a grid share seeds and examples.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from benchmarks.machine import machine
from benchmarks.results import read_json
from rightrank.decision.comparison import Estimate, estimate
from rightrank.decision.evidence import Evidence, measured_noise
from rightrank.decision.rule import decision_of
from rightrank.decision.seeds import BOUND_DEGREES, NOISE, PairNoise, pair_noise
from rightrank.decision.table import Cell, Contender, ScoreTable

HERE = Path(__file__).parent
STORED = HERE / "seed_grids.json.xz"
REAL_GRIDS = HERE.parent / "selection" / "real_grids.json.xz"
LEARNED = {  # the ratio of .1 was chosen on these, and on the first 12 planted teachers
    "packages_20_steps",
    "packages_40_steps",
    "docstrings_40_steps",
    "senses_80_steps",
    "senses_400_steps",
    "glosses16_400_steps",
}
LEARNED_TEACHERS = 12
PUBLISHED = 0.0003  # nats: the constant that intervals of one seed had
RESAMPLES = 2000

Grid = dict[str, Any]
Interval = tuple[
    float, float, float
]  # the two-sided 95% interval and the one-sided upper bound, about the mean as measured


def stored_grids() -> dict[str, Grid]:
    found: dict[str, Grid] = read_json(STORED)
    return found


def grids_in(path: Path) -> Iterator[tuple[str, Grid]]:
    """The grids of a file of `benchmarks/selection` that have two seeds or more."""
    for curve in read_json(path)["curves"]:
        cells = [
            [int(rank), float(rate), int(seed), losses]
            for rank, by_rate in curve.get("item_losses", {}).items()
            for rate, by_seed in by_rate.items()
            for seed, losses in by_seed.items()
        ]
        if len({cell[2] for cell in cells}) > 1:
            steps = curve.get("steps") or curve["settings"].get("max_steps")
            yield curve["id"], _grid("real", curve["id"], "loss", steps, curve["item_tokens"], cells)


def _grid(family: str, task: str, metric: str, steps: int, tokens: list[int], cells: list[list[Any]]) -> Grid:
    return {"family": family, "task": task, "metric": metric, "steps": steps, "tokens": tokens, "cells": cells}


@dataclass(frozen=True)
class Source:
    """A grid as cells."""

    name: str
    task: str  # and model
    family: str
    metric: str
    cells: dict[tuple[int, float, int], Cell]

    @property
    def seeds(self) -> list[int]:
        """The seeds that every rank and learning rate of the grid has, a diverged cell aside."""
        counts: dict[int, int] = {}
        for _, _, seed in self.cells:
            counts[seed] = counts.get(seed, 0) + 1
        return sorted(seed for seed, count in counts.items() if count >= max(counts.values()) - 1)

    def table(self, seeds: tuple[int, ...]) -> ScoreTable:
        cells = {key: cell for key, cell in self.cells.items() if key[2] in seeds}
        higher = self.metric == "accuracy"
        return ScoreTable(self.metric, higher, cells, kind="accuracy" if higher else "token_loss")


def source_of(name: str, grid: Grid) -> Source:
    weights = np.asarray(grid["tokens"], dtype=np.float64)
    sign = -1.0 if grid["metric"] == "accuracy" else 1.0
    cells = {}
    for rank, rate, seed, scores in grid["cells"]:
        sums = sign * np.asarray(scores, dtype=np.float64)
        value = sign * float(sums.sum() / weights.sum())
        cells[int(rank), float(rate), int(seed)] = Cell(f"{rank} {rate} {seed}", value, sums, weights)
    return Source(name, grid["task"], grid["family"], grid["metric"], cells)


@dataclass(frozen=True)
class Seen:
    """One rank against the reference as a decision from some seeds sees it."""

    evidence: Evidence
    contender: Contender
    sums: np.ndarray  # [seeds, examples] of the differences
    weights: np.ndarray
    noise: PairNoise

    @property
    def plain(self) -> Estimate:
        return estimate(self.sums, self.weights)


def before(seen: Seen) -> Interval:
    found = seen.plain
    if found.seeds == 1:
        level = seen.evidence.table.kind == "accuracy"
        return _ends(found.with_seeds(2 * (0.007 if level else PUBLISHED) ** 2, 0.0))
    noise = measured_noise(list(seen.evidence.contenders.values()))
    pooled = found.with_seeds(2 * noise.individual / found.seeds, noise.individual_degrees)
    return _ends(pooled.of_a_further_seed())


def own(seen: Seen) -> Interval:
    return _ends(seen.plain.of_a_further_seed())


def at_ratio(seen: Seen, ratio: float, degrees: float) -> Interval:
    found = seen.plain
    return _ends(found.with_seeds(ratio * seen.noise.spread / found.seeds, degrees).of_a_further_seed())


def pooled(seen: Seen) -> Interval:
    evidence = seen.evidence
    others = [one for one in evidence.contenders.values() if one is not evidence.reference]
    noises = [seen_of(evidence, other).noise for other in others]
    degrees = sum(noise.degrees for noise in noises)
    return at_ratio(seen, sum(noise.degrees * noise.ratio for noise in noises) / degrees, degrees)


def expected(seen: Seen) -> Interval:
    return at_ratio(seen, NOISE.over_seeds(seen.plain.examples), BOUND_DEGREES)


def after(seen: Seen) -> Interval:
    found = seen.evidence.difference(seen.contender)
    return _ends(found if found.seeds == 1 else found.of_a_further_seed())


METHODS: dict[str, Callable[[Seen], Interval]] = {
    "before": before, "own": own, "pooled": pooled, "expected": expected, "after": after,
}  # fmt: skip
OF_ONE_SEED = ("before", "expected", "after")
OF_EXAMPLES = ("expected",)


def methods_for(seeds: int, has_examples: bool) -> list[str]:
    return [
        name for name in METHODS if (seeds > 1 or name in OF_ONE_SEED) and (has_examples or name not in OF_EXAMPLES)
    ]


def seen_of(evidence: Evidence, contender: Contender) -> Seen:
    shared = sorted(contender.cells.keys() & evidence.reference.cells.keys())
    sums = np.stack([contender.cells[seed].sums - evidence.reference.cells[seed].sums for seed in shared])
    weights = evidence.reference.cells[shared[0]].weights
    return Seen(evidence, contender, sums, weights, pair_noise(sums, weights))


def _ends(found: Estimate) -> Interval:
    both, upper = (float(stdtrit(found.degrees, level)) * found.standard_error for level in (0.975, 0.95))
    return found.mean - both, found.mean + both, found.mean + upper


@dataclass(frozen=True)
class Check:
    """One interval against one seed that it has not seen."""

    grid: str  # grids of the same model and task are one
    seeds: int
    method: str
    held: bool
    below: bool  # the seed's difference is below the one-sided 95% bound
    width: float  # half of the interval: over the spread between examples, or in the metric's unit without examples


def checks(source: Source, sizes: Sequence[int] | None = None) -> Iterator[Check]:
    """Every choice of `sizes` seeds (default: of every size) against every seed left."""
    for size in sizes or range(1, len(source.seeds)):
        for chosen in itertools.combinations(source.seeds, size):
            evidence = Evidence(source.table(chosen))
            reference = evidence.reference
            for contender in evidence.contenders.values():
                if contender is reference or not contender.cells.keys() & reference.cells.keys():
                    continue
                seen = seen_of(evidence, contender)
                for held_out in set(source.seeds) - set(chosen):
                    shown = _difference(source, contender, reference, held_out)
                    if shown is None:
                        continue
                    for method in methods_for(size, evidence.has_examples):
                        low, high, upper = METHODS[method](seen)
                        width = (high - low) / 2 / math.sqrt(seen.noise.spread) if seen.noise.spread > 0 else 0.0
                        yield Check(source.task, size, method, low <= shown <= high, shown <= upper, width)


def _difference(source: Source, contender: Contender, reference: Contender, seed: int) -> float | None:
    keys = [(one.rank, one.learning_rate, seed) for one in (contender, reference)]
    if not all(key in source.cells for key in keys):
        return None
    ours, theirs = (source.cells[key] for key in keys)
    return ours.loss - theirs.loss


def share(found: list[Check], held: Callable[[Check], bool]) -> dict[str, Any]:
    """The share with its count, and a 95% interval that resamples whole grids; None with fewer than three grids."""
    by_grid: dict[str, list[bool]] = {}
    for check in found:
        by_grid.setdefault(check.grid, []).append(held(check))
    values = list(by_grid.values())
    entry: dict[str, Any] = {
        "share": round(float(np.mean(list(itertools.chain(*values)))), 3),
        "of": sum(map(len, values)),
        "grids": len(values),
        "interval": None,
    }
    if len(values) >= 3:
        generator = np.random.default_rng(0x5EED)
        draws = generator.integers(len(values), size=(RESAMPLES, len(values)))
        means = [np.mean(list(itertools.chain(*(values[place] for place in draw)))) for draw in draws]
        entry["interval"] = [round(float(end), 3) for end in np.quantile(means, (0.025, 0.975))]
    return entry


def summary(found: list[Check]) -> dict[str, Any]:
    """By number of seeds and method."""
    table: dict[str, Any] = {}
    for seeds, method in sorted({(check.seeds, check.method) for check in found}):
        of = [check for check in found if (check.seeds, check.method) == (seeds, method)]
        table.setdefault(str(seeds), {})[method] = {
            **share(of, lambda check: check.held),
            "below": share(of, lambda check: check.below)["share"],
            "median_half_width": round(float(np.median([check.width for check in of])), 3),
        }
    return table


def groups(sources: list[Source]) -> dict[str, list[Source]]:
    """Losses of real grids that the ratio was learned on, of those that chose nothing, and the other families."""
    real = [source for source in sources if source.family == "real"]
    losses = [source for source in real if source.metric == "loss"]
    taught = [source for source in sources if source.family == "planted"]
    return {
        "real, learned on": [source for source in losses if source.name in LEARNED],
        "real, chose nothing": [source for source in losses if source.name not in LEARNED],
        "accuracy": [source for source in real if source.metric == "accuracy"],
        "GLUE, one number": [source for source in sources if source.family == "GLUE"],
        "planted, learned on": [source for source in taught if number_of(source) < LEARNED_TEACHERS],
        "planted, chose nothing": [source for source in taught if number_of(source) >= LEARNED_TEACHERS],
    }


def number_of(source: Source) -> int:
    """The number of a planted teacher, which its name begins with."""
    return int(source.name.split("_")[1])


def answers(sources: list[Source], sizes: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    """What the decision names from some seeds, against the mean of the seeds that it has not seen.

    `named` of the choices of seeds get a rank; of those, `worse` are worse than the best rank by more than the margin in
    the mean of the other seeds, at their learning rates.
    """
    found: dict[str, Any] = {}
    for size in sizes:
        named, worse, choices = 0, 0, 0
        for source in sources:
            for chosen in itertools.combinations(source.seeds, size):
                rest = tuple(seed for seed in source.seeds if seed not in chosen)
                if not rest:
                    continue
                choices += 1
                decision = decision_of(source.table(chosen), confidence=None)
                if decision.rank is not None:
                    others = Evidence(source.table(rest))
                    loss = others.contenders[decision.rank].fair_loss
                    named += 1
                    worse += loss - others.reference.fair_loss > decision.margin
        if choices:
            found[str(size)] = {"choices": choices, "named": named, "worse": worse}
    return found


def judge(sources: list[Source]) -> dict[str, Any]:
    found = {source.name: list(checks(source)) for source in sources}
    result: dict[str, Any] = {"groups": {}, "grids": {}, "answers": {}}
    for name, members in groups(sources).items():
        if members:
            result["groups"][name] = summary([check for source in members for check in found[source.name]])
            result["answers"][name] = answers(members)
    for source in sources:
        if source.family == "real":
            result["grids"][source.name] = {"seeds": len(source.seeds)} | summary(found[source.name])
    return result


def show(result: dict[str, Any]) -> None:
    print(f"{'':22} seeds {'method':10} holds  of    grids  interval          below   half width")
    for group, by_seeds in (result["groups"] | result["grids"]).items():
        for seeds, by_method in ((key, value) for key, value in by_seeds.items() if key != "seeds"):
            for method, entry in by_method.items():
                interval = entry["interval"] and "{:.0%} to {:.0%}".format(*entry["interval"])
                print(
                    f"{group[:22]:22} {seeds:5} {method:10} {entry['share']:5.0%} {entry['of']:5} {entry['grids']:6}  "
                    f"{interval or 'too few':16} {entry['below']:5.0%} {entry['median_half_width']:9.2f}"
                )

    for group, by_seeds in result["answers"].items():
        print(group, json.dumps(by_seeds))


def main() -> None:
    sources = [source_of(name, grid) for name, grid in (dict(grids_in(REAL_GRIDS)) | stored_grids()).items()]
    result = {"machine": machine(), **judge([source for source in sources if len(source.seeds) > 1])}
    show(result)
    (HERE / "seed_coverage.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
