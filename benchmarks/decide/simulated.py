"""Draw tables with a given truth: a curve over ranks, and noise of examples, seeds, and both."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rightrank.decision.comparison import walk_down
from rightrank.decision.rule import Comparison
from rightrank.decision.table import Cell, ScoreTable

Floats = NDArray[np.float64]
Shape = Literal["power", "flat", "u_shaped", "rising"]
Tails = Literal["normal", "heavy"]

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
MARGIN = 0.005


def find_shown_rank(comparison: Comparison) -> int | None:
    """Find the smallest rank that the bounds show to be enough; None if none passed, or if a higher rank may be better."""
    reference, by_rank = comparison.reference.rank, comparison.by_rank
    smallest = walk_down(by_rank, reference, lambda rank: by_rank[rank].non_inferior is True)
    is_doubtful = any(-by_rank[rank].low > comparison.margin for rank in comparison.ranks if rank > reference)
    return None if smallest == reference or is_doubtful else smallest


@dataclass(frozen=True)
class World:
    """The distribution of simulated tables. Deviations are in nats per token.

    The seed noise of a difference is .13 to .27 of its deviation between examples, as on real grids (seed_coverage.json).
    """

    shape: Shape
    seeds: int
    items: int
    tails: Tails = "normal"
    item_level: float = 0.6  # of an example's own loss, shared by all ranks and seeds
    item_rank: float = 0.005  # of an example's preference for a rank, correlated along the ranks
    seed_level: float = 0.005  # of a seed, shared by all ranks
    seed_rank: float = 0.0015  # of one training, in addition to its seed
    example_noise: float = 0.01  # of one example in one training
    correlation: float = 0.5  # between neighbouring ranks, of item_rank and seed_rank
    unequal: float = 2.0  # deviations of item_rank and seed_rank at the lowest rank, relative to the highest
    margin: float = MARGIN
    scored: bool = True  # whether there are scores of single examples, rather than one number for each training
    name: str = ""


def draw_true_losses(world: World, generator: np.random.Generator) -> Floats:
    """Draw true losses [ranks], so that the answers are spread over all ranks."""
    ranks = np.array(RANKS, dtype=np.float64)
    if world.shape == "flat":
        return np.full(len(ranks), 2.0) + generator.uniform(-0.1, 0.1) * world.margin * np.log2(ranks) / 7
    exponent = generator.uniform(0.38, 0.8)
    if world.shape == "rising":
        size = world.margin * generator.uniform(1.5, 6.0)
        return 2.0 + size * (7 - np.log2(ranks))
    sufficient_rank = 2.0 ** generator.uniform(0.5, 6.0)
    law = 2.0 + world.margin * (ranks / sufficient_rank) ** -exponent
    if world.shape == "u_shaped":
        law = law + world.margin * generator.uniform(0.05, 0.4) * np.maximum(0.0, np.log2(ranks / sufficient_rank)) ** 2
    return law


def find_true_rank(losses: Floats, margin: float) -> int:
    """Apply the rule to the true losses."""
    excess = dict(zip(RANKS, losses - losses.min(), strict=True))
    return walk_down(RANKS, RANKS[int(np.argmin(losses))], lambda rank: bool(excess[rank] < margin))


def draw_table(world: World, losses: Floats, generator: np.random.Generator) -> ScoreTable:
    """Draw one table: every rank at one learning rate, with the same seeds and examples."""
    ranks, seeds, items = len(RANKS), world.seeds, world.items
    tokens = generator.integers(5, 60, size=items).astype(np.float64)
    spread = np.linspace(world.unequal, 1.0, ranks)
    level = world.item_level * _draw_noise(world, generator, (items,))
    taste = _correlate_ranks(world, _draw_noise(world, generator, (ranks, items)), spread) * world.item_rank
    seed = world.seed_level * generator.standard_normal(seeds)
    trained = _correlate_ranks(world, generator.standard_normal((ranks, seeds)), spread) * world.seed_rank
    residuals = world.example_noise * _draw_noise(world, generator, (ranks, seeds, items))
    scores = losses[:, None, None] + seed[None, :, None] + trained[:, :, None]
    scores = scores + (level[None, :] + taste)[:, None, :] + residuals
    sums = scores * tokens
    if not world.scored:
        sums, tokens = sums.sum(axis=2, keepdims=True) / tokens.sum(), np.ones(1)
    cells = {
        (rank, 1e-3, number): Cell(
            f"{rank}-{number}", float(sums[index, number].sum() / tokens.sum()), sums[index, number], tokens
        )
        for index, rank in enumerate(RANKS)
        for number in range(seeds)
    }
    return ScoreTable("loss", False, cells)


def with_quiet_seeds(world: World) -> World:
    """Return the world with the small seed noise that repeats of long trainings had, far below what the examples suggest."""
    return replace(world, name="quiet seeds", item_rank=0.015, seed_level=0.0005, seed_rank=0.0003, example_noise=0.03)


def _draw_noise(world: World, generator: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Draw values of mean 0 and deviation 1: normal, or log-normal with a long right tail (skewness 4)."""
    normal = generator.standard_normal(shape)
    if world.tails == "normal":
        return normal
    width = 0.85
    raw = np.exp(width * normal)
    mean, deviation = np.exp(width**2 / 2), np.exp(width**2 / 2) * np.sqrt(np.exp(width**2) - 1)
    heavy: Floats = (raw - mean) / deviation
    return heavy


def _correlate_ranks(world: World, draws: Floats, spread: Floats) -> Floats:
    """Apply first-order correlation along the ranks, with deviations `spread`."""
    rho = world.correlation
    for index in range(1, len(draws)):
        draws[index] = rho * draws[index - 1] + np.sqrt(1 - rho * rho) * draws[index]
    return draws * spread[:, None]
