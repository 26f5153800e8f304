"""Measure whether the printed bounds cover. They bound differences from the rank with the best value after a search.

    python -m benchmarks.decide.printed              # prints the table, writes printed.json
    python -m benchmarks.decide.printed --tables 5   # a short run that stores nothing

The rank and its learning rate are chosen on the same noise that the bounds describe, so both the reference and the other ranks look
better than they are. Simulated tables: four shapes of curve over ranks 1 to 64, one or three learning rates for each rank (the search keeps the
best), 1 to 5 seeds, one number for each training or scores by example, seed noise of a training from a quarter of the margin to four times the margin,
and rare large differences: one training in twenty, or one example in a hundred, is far off.

`corrected` bounds are those of the decision; `plain` ones lack the estimate of the selection bias.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

from benchmarks.decide.simulated import MARGIN, Floats, Shape, find_shown_rank
from benchmarks.machine import describe_machine
from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import Comparison, compare_ranks
from rightrank.decision.table import Cell, ScoreTable

OUT = Path(__file__).with_name("printed.json")
RANKS = (1, 2, 4, 8, 16, 32, 64)
SHAPES: tuple[Shape, ...] = ("power", "flat", "u_shaped", "rising")
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of one training over seeds, in margins
EXAMPLES = 200
SEED = 2411
METHODS = ("plain", "corrected")


@dataclass(frozen=True)
class Design:
    """The distribution of simulated tables. Deviations are in nats per token."""

    shape: Shape
    seeds: int
    noise: float  # of one training over seeds, in margins
    learning_rates: int = 1
    examples: int = 0  # 0 for one number per training
    rare: bool = False  # whether a few trainings or examples have large differences
    spread: float = 0.03  # deviation of an example's preference for a rank, and of its noise in a training


@dataclass(frozen=True)
class Shares:
    """Results of one method on the tables of one design. Bounds are evaluated for every rank except the best one."""

    upper: float  # share of upper bounds that hold
    lower: float
    refuted: float  # share of ranks that are reported as worse than the margin
    refuted_wrongly: float
    false_fallback: float  # share of tables in which a rank that the bounds show to be enough is worse than the margin


class UncorrectedEvidence(Evidence):
    """Evidence that takes the reference as it looks."""

    @cached_property
    def selection_bias(self) -> float:
        return 0.0


def draw_true_losses(design: Design, generator: np.random.Generator) -> Floats:
    """Draw true means [ranks, learning rates]. The best learning rate differs from rank to rank."""
    ranks = np.array(RANKS, dtype=np.float64)
    sufficient_rank, exponent = 2.0 ** generator.uniform(0.5, 5.0), generator.uniform(0.38, 0.8)
    curve = np.full(len(ranks), 2.0)
    if design.shape in ("power", "u_shaped"):
        curve = 2.0 + MARGIN * (ranks / sufficient_rank) ** -exponent
    if design.shape == "u_shaped":
        curve = curve + MARGIN * generator.uniform(0.05, 0.4) * np.maximum(0.0, np.log2(ranks / sufficient_rank)) ** 2
    if design.shape == "rising":
        curve = 2.0 + MARGIN * generator.uniform(0.5, 3.0) * (6 - np.log2(ranks))
    scale = MARGIN * generator.choice([0.3, 1.5])
    behind = np.abs(scale * generator.standard_normal((len(ranks), design.learning_rates)))
    losses: Floats = curve[:, None] + behind - behind.min(axis=1, keepdims=True)
    return losses


def draw_table(design: Design, losses: Floats, generator: np.random.Generator) -> ScoreTable:
    """Draw one table with the same seeds and examples for every rank and learning rate."""
    ranks, rates = losses.shape
    trained = design.noise * MARGIN * generator.standard_normal((ranks, rates, design.seeds))
    if design.rare and not design.examples:
        trained = trained * np.where(generator.random(trained.shape) < 0.05, 4.0, 0.7)
    means = losses[:, :, None] + 0.5 * design.noise * MARGIN * generator.standard_normal(design.seeds) + trained
    weights = np.ones(1)
    sums = means[..., None]
    if design.examples:
        weights = generator.integers(5, 60, size=design.examples).astype(np.float64)
        example_effects = generator.standard_normal((ranks, design.examples))
        if design.rare:
            far = 8 * np.abs(generator.standard_normal(example_effects.shape)) - 0.08 * np.sqrt(2 / np.pi)
            example_effects = np.where(
                generator.random(example_effects.shape) < 0.01, far, 0.3 * example_effects - 0.08 * np.sqrt(2 / np.pi)
            )
        residuals = generator.standard_normal((*means.shape, design.examples))
        level = 0.6 * generator.standard_normal(design.examples)
        sums = (sums + level + design.spread * (example_effects[:, None, None, :] + residuals)) * weights
    cells = {
        (rank, get_learning_rate(rate), seed): Cell(
            f"{rank}-{rate}-{seed}",
            float(sums[index, rate, seed].sum() / weights.sum()),
            sums[index, rate, seed],
            weights,
        )
        for index, rank in enumerate(RANKS)
        for rate in range(rates)
        for seed in range(design.seeds)
    }
    return ScoreTable("loss", False, cells)


def get_learning_rate(index: int) -> float:
    return float(10.0 ** -(index + 2))


def judge_design(design: Design, tables: int, seed: int) -> dict[str, Shares]:
    """Return the results of both methods on the same tables."""
    generator = np.random.default_rng(seed)
    rows: dict[str, list[list[float]]] = {method: [] for method in METHODS}
    for _ in range(tables):
        losses = draw_true_losses(design, generator)
        table = draw_table(design, losses, generator)
        for method, evidence in (("plain", UncorrectedEvidence(table)), ("corrected", Evidence(table))):
            rows[method].append(_judge_comparison(compare_ranks(evidence, MARGIN), losses))
    return {method: Shares(*np.mean(values, axis=0).tolist()) for method, values in rows.items()}


def _judge_comparison(comparison: Comparison, losses: Floats) -> list[float]:
    rates = {rank: rank_comparison.learning_rate for rank, rank_comparison in comparison.evidence.contenders.items()}
    rate_indices = {get_learning_rate(index): index for index in range(losses.shape[1])}
    true = {rank: float(losses[index, rate_indices[rates[rank]]]) for index, rank in enumerate(RANKS)}
    reference, best = comparison.reference.rank, losses.min(axis=1)
    differences = [(comparison.by_rank[rank], true[rank] - true[reference]) for rank in RANKS if rank != reference]
    excess = {rank: loss - float(best.min()) for rank, loss in true.items()}
    fallback = find_shown_rank(comparison)
    return [
        float(np.mean([difference <= rank_comparison.high for rank_comparison, difference in differences])),
        float(np.mean([difference >= rank_comparison.low for rank_comparison, difference in differences])),
        float(np.mean([rank_comparison.non_inferior is False for rank_comparison, _ in differences])),
        float(
            np.mean(
                [
                    rank_comparison.non_inferior is False and difference <= MARGIN
                    for rank_comparison, difference in differences
                ]
            )
        ),
        float(fallback is not None and excess[fallback] > MARGIN),
    ]


def list_designs() -> list[Design]:
    """Return designs with at least two seeds, then designs with one seed, which have no noise over seeds because their bounds do not include it."""
    kinds = list(product((0, EXAMPLES), (False, True), (1, 3), SHAPES))
    several = [
        Design(shape, seeds, noise, rates, examples, rare)
        for seeds, noise, (examples, rare, rates, shape) in product((2, 3, 5), NOISES, kinds)
    ]
    return several + [
        Design(shape, 1, 0.0, rates, examples, rare) for examples, rare, rates, shape in kinds if examples
    ]


def summarize(results: Sequence[tuple[Design, dict[str, Shares]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Average over designs with equal weights: by noise, by number of seeds, and over all designs with at least two seeds."""
    several = [(design, shares) for design, shares in results if design.seeds > 1]
    groups = {"two seeds or more": several}
    groups |= {f"seed noise {noise:g}": [result for result in several if result[0].noise == noise] for noise in NOISES}
    groups |= {f"{seeds} seeds": [result for result in several if result[0].seeds == seeds] for seeds in (2, 3, 5)}
    groups |= {
        "several learning rates": [result for result in several if result[0].learning_rates > 1],
        "rare large differences": [result for result in several if result[0].rare],
        "one seed": [result for result in results if result[0].seeds == 1],
    }
    return {
        name: {method: _compute_means(group, method) for method in METHODS} for name, group in groups.items() if group
    }


def _compute_means(group: Sequence[tuple[Design, dict[str, Shares]]], method: str) -> dict[str, float]:
    names = list(Shares.__dataclass_fields__)
    values = np.array([[getattr(shares[method], name) for name in names] for _, shares in group])
    means = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
    lowest = {
        f"{name}, 5th percentile of designs": float(np.quantile(values[:, names.index(name)], 0.05))
        for name in names[:2]
    }
    return {name: round(value, 4) for name, value in {**means, **lowest}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=int, default=20)
    arguments = parser.parse_args()
    start_time = time.perf_counter()
    results = [
        (design, judge_design(design, arguments.tables, SEED + number)) for number, design in enumerate(list_designs())
    ]
    totals = summarize(results)
    for name, by_method in totals.items():
        for method, shares in by_method.items():
            print(f"{name:24} {method:7}", " ".join(f"{key} {value:.3f}" for key, value in shares.items()))
    if arguments.tables < parser.get_default("tables"):
        return
    result = {
        "machine": describe_machine(),
        "seed": SEED,
        "tables": arguments.tables,
        "designs": len(results),
        "seconds": round(time.perf_counter() - start_time),
        "summary": totals,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
