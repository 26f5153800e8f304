"""Measure whether the interval covers the difference of an extra seed, on grids of real trainings with at least two seeds.

    python -m benchmarks.decide.seed_coverage    # judges, and writes seed_coverage.json

`seed_grids.json.xz` has grids of run folders, accuracies on GLUE (github.com/silversuncn/lora-rank-scaling, MIT: 50 to 5,000 training examples,
six ranks, five seeds, one number for each training), and planted teachers with five seeds.

A decision is made from some seeds of a grid, each rank at its best learning rate on them. For every rank below or above the
reference, the interval is compared with the paired difference of a seed that the decision has not used, at the same
learning rates and on the same held-out examples. Every choice of seeds is tested.

    before      one seed: variation of examples and the published .0003 nats; more seeds: the seed noise pooled over ranks
    own         only the rank's own variance over seeds, Student's t
    pooled      the ratio of seed noise to the deviation between examples, pooled over the measured ranks
    expected    only the ratio of earlier grids (`NOISE`), nothing measured
    after       the decision's `predictive_low` and `predictive_high`

`before` and `own` are also widened by the extra seed's noise where they estimate it. Shares are given with the number of
differences and a 95% interval that resamples complete grids, since the differences of a grid share seeds and examples.
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

from benchmarks.machine import describe_machine
from benchmarks.results import read_json
from rightrank.decision.comparison import Estimate, estimate_mean
from rightrank.decision.evidence import Evidence, measure_noise
from rightrank.decision.rule import decide_table
from rightrank.decision.seeds import BOUND_DEGREES, NOISE, PairNoise, measure_pair_noise
from rightrank.decision.table import Cell, Contender, ScoreTable

HERE = Path(__file__).parent
STORED = HERE / "seed_grids.json.xz"
REAL_GRIDS = HERE.parent / "selection" / "real_grids.json.xz"
LEARNED = {  # The ratio of .1 was chosen on these and on the first 12 planted teachers.
    "packages_20_steps",
    "packages_40_steps",
    "docstrings_40_steps",
    "senses_80_steps",
    "senses_400_steps",
    "glosses16_400_steps",
}
LEARNED_TEACHERS = 12
PUBLISHED = 0.0003  # nats; the constant that intervals of one seed used before
RESAMPLES = 2000

Grid = dict[str, Any]
Interval = tuple[
    float, float, float
]  # the two-sided 95% interval and the one-sided upper bound, around the observed mean


def read_stored_grids() -> dict[str, Grid]:
    grids: dict[str, Grid] = read_json(STORED)
    return grids


def iterate_grids(path: Path) -> Iterator[tuple[str, Grid]]:
    """Yield the grids with at least two seeds from a file of `benchmarks/selection`."""
    for curve in read_json(path)["curves"]:
        cells = [
            [int(rank), float(rate), int(seed), losses]
            for rank, by_rate in curve.get("item_losses", {}).items()
            for rate, by_seed in by_rate.items()
            for seed, losses in by_seed.items()
        ]
        if len({cell[2] for cell in cells}) > 1:
            steps = curve.get("steps") or curve["settings"].get("max_steps")
            yield curve["id"], _build_grid("real", curve["id"], "loss", steps, curve["item_tokens"], cells)


def _build_grid(family: str, task: str, metric: str, steps: int, tokens: list[int], cells: list[list[Any]]) -> Grid:
    return {"family": family, "task": task, "metric": metric, "steps": steps, "tokens": tokens, "cells": cells}


@dataclass(frozen=True)
class Source:
    """A grid as table cells."""

    name: str
    task: str  # and model
    family: str
    metric: str
    cells: dict[tuple[int, float, int], Cell]

    @property
    def seeds(self) -> list[int]:
        """Return the seeds that every rank and learning rate of the grid has, except for at most one diverged cell."""
        counts: dict[int, int] = {}
        for _, _, seed in self.cells:
            counts[seed] = counts.get(seed, 0) + 1
        return sorted(seed for seed, count in counts.items() if count >= max(counts.values()) - 1)

    def table(self, seeds: tuple[int, ...]) -> ScoreTable:
        cells = {key: cell for key, cell in self.cells.items() if key[2] in seeds}
        higher = self.metric == "accuracy"
        return ScoreTable(self.metric, higher, cells, kind="accuracy" if higher else "token_loss")


def build_source(name: str, grid: Grid) -> Source:
    weights = np.asarray(grid["tokens"], dtype=np.float64)
    sign = -1.0 if grid["metric"] == "accuracy" else 1.0
    cells = {}
    for rank, rate, seed, scores in grid["cells"]:
        sums = sign * np.asarray(scores, dtype=np.float64)
        value = sign * float(sums.sum() / weights.sum())
        cells[int(rank), float(rate), int(seed)] = Cell(f"{rank} {rate} {seed}", value, sums, weights)
    return Source(name, grid["task"], grid["family"], grid["metric"], cells)


@dataclass(frozen=True)
class Observation:
    """The difference of one rank from the reference, as a decision from some of the seeds measures it."""

    evidence: Evidence
    contender: Contender
    sums: np.ndarray  # [seeds, examples] of the differences
    weights: np.ndarray
    noise: PairNoise

    @property
    def plain(self) -> Estimate:
        return estimate_mean(self.sums, self.weights)


def compute_uncorrected_interval(observation: Observation) -> Interval:
    difference = observation.plain
    if difference.seeds == 1:
        level = observation.evidence.table.kind == "accuracy"
        return _compute_ends(difference.replace_seed_variance(2 * (0.007 if level else PUBLISHED) ** 2, 0.0))
    noise = measure_noise(list(observation.evidence.contenders.values()))
    pooled = difference.replace_seed_variance(2 * noise.individual / difference.seeds, noise.individual_degrees)
    return _compute_ends(pooled.predict_extra_seed())


def compute_own_interval(observation: Observation) -> Interval:
    return _compute_ends(observation.plain.predict_extra_seed())


def compute_ratio_interval(observation: Observation, ratio: float, degrees: float) -> Interval:
    difference = observation.plain
    return _compute_ends(
        difference.replace_seed_variance(
            ratio * observation.noise.example_variance / difference.seeds, degrees
        ).predict_extra_seed()
    )


def compute_pooled_interval(observation: Observation) -> Interval:
    evidence = observation.evidence
    contenders = [contender for contender in evidence.contenders.values() if contender is not evidence.reference]
    noises = [build_observation(evidence, contender).noise for contender in contenders]
    degrees = sum(noise.degrees for noise in noises)
    return compute_ratio_interval(observation, sum(noise.degrees * noise.ratio for noise in noises) / degrees, degrees)


def compute_expected_interval(observation: Observation) -> Interval:
    return compute_ratio_interval(observation, NOISE.compute_seed_ratio(observation.plain.examples), BOUND_DEGREES)


def compute_decision_interval(observation: Observation) -> Interval:
    difference = observation.evidence.estimate_difference(observation.contender)
    return _compute_ends(difference if difference.seeds == 1 else difference.predict_extra_seed())


METHODS: dict[str, Callable[[Observation], Interval]] = {
    "before": compute_uncorrected_interval, "own": compute_own_interval, "pooled": compute_pooled_interval, "expected": compute_expected_interval, "after": compute_decision_interval,
}  # fmt: skip
OF_ONE_SEED = ("before", "expected", "after")
OF_EXAMPLES = ("expected",)


def list_methods(seeds: int, has_examples: bool) -> list[str]:
    return [
        name for name in METHODS if (seeds > 1 or name in OF_ONE_SEED) and (has_examples or name not in OF_EXAMPLES)
    ]


def build_observation(evidence: Evidence, contender: Contender) -> Observation:
    shared = sorted(contender.cells.keys() & evidence.reference.cells.keys())
    sums = np.stack([contender.cells[seed].sums - evidence.reference.cells[seed].sums for seed in shared])
    weights = evidence.reference.cells[shared[0]].weights
    return Observation(evidence, contender, sums, weights, measure_pair_noise(sums, weights))


def _compute_ends(estimate: Estimate) -> Interval:
    two_sided, upper = (float(stdtrit(estimate.degrees, level)) * estimate.standard_error for level in (0.975, 0.95))
    return estimate.mean - two_sided, estimate.mean + two_sided, estimate.mean + upper


@dataclass(frozen=True)
class Check:
    """The result of testing one interval on one unseen seed."""

    grid: str  # grids of the same model and task share a name
    seeds: int
    method: str
    holds: bool
    below: bool  # the seed's difference is below the one-sided 95% bound
    width: float  # half of the interval's width, relative to the deviation between examples, or in the metric's unit without examples


def iterate_checks(source: Source, sizes: Sequence[int] | None = None) -> Iterator[Check]:
    """Test every choice of `sizes` seeds (default: all sizes) against every remaining seed."""
    for size in sizes or range(1, len(source.seeds)):
        for chosen in itertools.combinations(source.seeds, size):
            evidence = Evidence(source.table(chosen))
            reference = evidence.reference
            for contender in evidence.contenders.values():
                if contender is reference or len(contender.cells.keys() & reference.cells.keys()) < size:
                    continue  # an outlier is left out
                observation = build_observation(evidence, contender)
                for held_out in set(source.seeds) - set(chosen):
                    shown = _compute_difference(source, contender, reference, held_out)
                    if shown is None:
                        continue
                    for method in list_methods(size, evidence.has_examples):
                        low, high, upper = METHODS[method](observation)
                        width = (
                            (high - low) / 2 / math.sqrt(observation.noise.example_variance)
                            if observation.noise.example_variance > 0
                            else 0.0
                        )
                        yield Check(source.task, size, method, low <= shown <= high, shown <= upper, width)


def _compute_difference(source: Source, contender: Contender, reference: Contender, seed: int) -> float | None:
    keys = [(compared.rank, compared.learning_rate, seed) for compared in (contender, reference)]
    if not all(key in source.cells for key in keys):
        return None
    ours, theirs = (source.cells[key] for key in keys)
    return ours.loss - theirs.loss


def compute_share(checks: list[Check], condition: Callable[[Check], bool]) -> dict[str, Any]:
    """Return the share with its count, and a 95% interval that resamples complete grids; None with fewer than three grids."""
    by_grid: dict[str, list[bool]] = {}
    for check in checks:
        by_grid.setdefault(check.grid, []).append(condition(check))
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
        means = [np.mean(list(itertools.chain(*(values[index] for index in draw)))) for draw in draws]
        entry["interval"] = [round(float(end), 3) for end in np.quantile(means, (0.025, 0.975))]
    return entry


def summarize(checks: list[Check]) -> dict[str, Any]:
    """Summarize the checks by number of seeds and method."""
    table: dict[str, Any] = {}
    for seeds, method in sorted({(check.seeds, check.method) for check in checks}):
        of = [check for check in checks if (check.seeds, check.method) == (seeds, method)]
        table.setdefault(str(seeds), {})[method] = {
            **compute_share(of, lambda check: check.holds),
            "below": compute_share(of, lambda check: check.below)["share"],
            "median_half_width": round(float(np.median([check.width for check in of])), 3),
        }
    return table


def group_sources(sources: list[Source]) -> dict[str, list[Source]]:
    """Group the grids: real losses that the ratio was fitted on, real losses that were not used for any choice, and the other families."""
    real = [source for source in sources if source.family == "real"]
    losses = [source for source in real if source.metric == "loss"]
    taught = [source for source in sources if source.family == "planted"]
    return {
        "real, learned on": [source for source in losses if source.name in LEARNED],
        "real, chose nothing": [source for source in losses if source.name not in LEARNED],
        "accuracy": [source for source in real if source.metric == "accuracy"],
        "GLUE, one number": [source for source in sources if source.family == "GLUE"],
        "planted, learned on": [source for source in taught if parse_teacher_number(source) < LEARNED_TEACHERS],
        "planted, chose nothing": [source for source in taught if parse_teacher_number(source) >= LEARNED_TEACHERS],
    }


def parse_teacher_number(source: Source) -> int:
    """Return the number of a planted teacher, which its name begins with."""
    return int(source.name.split("_")[1])


def judge_answers(sources: list[Source], sizes: Sequence[int] = (1, 2, 3)) -> dict[str, Any]:
    """Compare the decision from some seeds with the mean of the unseen seeds.

    `named` is the number of choices of seeds whose decision names a rank. `worse` of these are worse than the best rank by more than the
    margin, in the mean of the other seeds and at their learning rates.
    """
    results: dict[str, Any] = {}
    for size in sizes:
        named, worse, choices = 0, 0, 0
        for source in sources:
            for chosen in itertools.combinations(source.seeds, size):
                unseen_seeds = tuple(seed for seed in source.seeds if seed not in chosen)
                if not unseen_seeds:
                    continue
                choices += 1
                decision = decide_table(source.table(chosen))
                if decision.rank is not None:
                    unseen_evidence = Evidence(source.table(unseen_seeds))
                    loss = unseen_evidence.contenders[decision.rank].loss
                    named += 1
                    worse += loss - unseen_evidence.reference.loss > decision.margin
        if choices:
            results[str(size)] = {"choices": choices, "named": named, "worse": worse}
    return results


def judge(sources: list[Source]) -> dict[str, Any]:
    checks_by_source = {source.name: list(iterate_checks(source)) for source in sources}
    result: dict[str, Any] = {"groups": {}, "grids": {}, "answers": {}}
    for name, members in group_sources(sources).items():
        if members:
            result["groups"][name] = summarize([check for source in members for check in checks_by_source[source.name]])
            result["answers"][name] = judge_answers(members)
    for source in sources:
        if source.family == "real":
            result["grids"][source.name] = {"seeds": len(source.seeds)} | summarize(checks_by_source[source.name])
    return result


def print_result(result: dict[str, Any]) -> None:
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
    sources = [
        build_source(name, grid) for name, grid in (dict(iterate_grids(REAL_GRIDS)) | read_stored_grids()).items()
    ]
    result = {"machine": describe_machine(), **judge([source for source in sources if len(source.seeds) > 1])}
    print_result(result)
    (HERE / "seed_coverage.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
