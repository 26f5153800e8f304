"""Draw tables of every kind from seeds, for the stored decisions in `decisions.json`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from rightrank.decision.evidence import Evidence
from rightrank.decision.rule import DEFAULT_CONFIDENCE, decide_table
from rightrank.decision.table import ScoreTable, build_table
from rightrank.schema.metrics import Checkpoint, infer_metric_kind
from rightrank.schema.results import Decision
from rightrank.schema.trials import TrialOutcome
from tests.decision.tables import make_trial

UNEVEN = 60
Curve = Callable[[int], float]

CURVES: dict[str, Curve] = {
    "saturating": lambda rank: 0.3 / rank,
    "rising": lambda rank: -0.1 * float(np.log2(rank)),
    "flat": lambda rank: 0.0002 / rank,
    "u_shaped": lambda rank: 0.03 * (float(np.log2(rank)) - 2) ** 2,
    "step": lambda rank: 0.2 if rank < 8 else 0.0,
    "slow": lambda rank: 0.1 * rank**-0.3,
    "lucky": lambda rank: 0.004 * ((rank * 7919) % 5 - 2),
}
METRICS: tuple[tuple[str, bool, float, float], ...] = (  # name, higher is better, level, scale
    ("eval_loss", False, 2.0, 1.0),
    ("perplexity", False, 2.0, 1.0),  # the level and scale refer to the logarithm
    ("accuracy", True, 0.7, 0.5),
    ("gsm8k", True, 60.0, 40.0),
    ("BLEU", True, 65.0, 10.0),
    ("value", False, 5.0, 1.0),
)


@dataclass(frozen=True, slots=True)
class World:
    """The parameters from which a table is drawn."""

    curve: str
    metric: str = "eval_loss"
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16)
    learning_rates: tuple[float, ...] = (1e-3,)
    seeds: tuple[int, ...] = (0,)
    num_examples: int = 0  # 0: one number per training
    noise: float = 0.004  # deviation of an example's difference between ranks, or of one number per training
    base: float | None = None  # this much worse than the level; None: not measured
    std: float | None = None
    margin: float | None = None
    weighted: bool = False
    missing: tuple[int, ...] = ()
    points: bool = False
    parting: float = 0.0  # how much lower ranks fall behind during the training
    trained: float | None = None  # decrease of the training value per doubling of the rank
    token_loss: bool = True
    seed: int = 0
    absent: float = 0.0  # the share of trainings without a result, so that ranks share only some of their seeds
    far: float = 0.0  # how much worse the trainings of seed 1 or of every seed are at one of the two largest ranks
    group: int = 1  # examples of a group
    lengths: tuple[int, ...] = ()  # of the trainings, in turn
    stopped_rates: tuple[float, ...] = ()  # tried at the largest rank, where they stopped early
    checkpoint: Checkpoint = "last"
    confidence: float = DEFAULT_CONFIDENCE


def decide_world(world: World) -> Decision:
    """Decide at the margin of the world, or at 1% of the best value where a metric without a default margin has no base."""
    table, margin = build_world_table(world), world.margin
    if margin is None and table.kind == "other" and not table.get_cells_by_rate(0):
        margin = 0.01 * Evidence(table).unit.reference
    return decide_table(table, margin, confidence=world.confidence, checkpoint=world.checkpoint)


def build_world_table(world: World) -> ScoreTable:
    _, higher, level, scale = next(metric for metric in METRICS if metric[0] == world.metric)
    generator = np.random.default_rng(world.seed)
    ease = 0.4 * generator.standard_normal(max(world.num_examples, 1)) * (world.num_examples > 0)
    weights = generator.integers(1, 9, size=max(world.num_examples, 1)).astype(float) if world.weighted else None
    results: list[TrialOutcome] = []
    for rank in ((0,) if world.base is not None else ()) + world.ranks:
        for learning_rate in world.learning_rates if rank else (0.0,):
            for seed in world.seeds if rank else (0,):
                worse = (world.base or 0.0) if rank == 0 else CURVES[world.curve](rank)
                if rank == world.ranks[-1 - world.seed % 2] and (seed == 1 or world.seed % 3 == 0):
                    worse += world.far
                worse += 0.01 * abs(float(np.log10(learning_rate / world.learning_rates[0]))) if rank else 0.0
                noise = world.noise * generator.standard_normal(len(ease))
                scores = level + scale * ((-1 if higher else 1) * (worse + noise) + ease)
                if world.metric == "perplexity":
                    scores = np.exp(scores)
                is_required = world.absent == 0 or rank == 0 or (rank in world.ranks[:2] and seed == world.seeds[0])
                if is_required or generator.random() >= world.absent:
                    results.append(_make_result(world, rank, learning_rate, seed, scores, weights))
    results += [make_trial(trial_id=f"gone-{rank}", rank=rank, value=None) for rank in world.missing]
    stopped_trainings = [make_trial(f"{rate}", world.ranks[-1], 9.0, "other", rate) for rate in world.stopped_rates]
    table = build_table(results, world.metric, higher, partial_outcomes=stopped_trainings)
    return table if world.token_loss else replace(table, kind=infer_metric_kind(world.metric, higher, "loss"))


def _make_result(world: World, rank: int, learning_rate: float, seed: int, scores: Any, weights: Any) -> TrialOutcome:
    value = float(np.average(scores, weights=weights))
    octave = float(np.log2(rank)) if rank else 0.0
    points: Sequence[tuple[int, float]] = ()
    if world.points:
        parting = world.parting / max(rank, 1)
        points = [(step, value + parting * (step - 100) / 100 + (100 - step) / 50) for step in (25, 50, 75, 100)]
    groups = [number // world.group for number in range(len(scores))]
    steps = world.lengths[(rank + seed) % len(world.lengths)] if world.lengths else 0
    return make_trial(
        trial_id=f"{rank}-{learning_rate:g}-{seed}",
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
        value=value,
        metric=world.metric,
        example_scores=scores.tolist() if world.num_examples else None,
        example_weights=weights.tolist() if world.num_examples and world.weighted else None,
        seed_deviation=world.std,
        averaged_seeds=3 if world.std is not None else 1,
        train_value=None if world.trained is None else 1.9 - world.trained * octave,
        steps=steps or (100 if world.points else 0),
        example_groups=groups if world.num_examples and world.group > 1 else None,
        points=points,
    )


def build_worlds() -> dict[str, World]:
    """Return a world for each branch of the rule by name, and random combinations."""
    chosen_worlds = {
        "bare saturating": World("saturating"),
        "bare rising": World("rising"),
        "bare flat": World("flat", noise=0.0),
        "bare u-shaped, training falls": World("u_shaped", trained=0.1),
        "bare u-shaped, training rises": World("u_shaped", trained=-0.1),
        "bare no gain": World("flat", base=0.001, noise=0.0),
        "bare gain": World("saturating", base=1.0),
        "bare two ranks": World("saturating", ranks=(2, 16)),
        "bare perplexity": World("saturating", "perplexity"),
        "bare percent": World("saturating", "gsm8k"),
        "bare relative": World("slow", "BLEU"),
        "bare unnamed": World("step", "value"),
        "stated": World("saturating", std=0.002),
        "stated perplexity": World("saturating", "perplexity", std=0.02),
        "stated rising": World("rising", std=0.01),
        "stated wide": World("slow", std=0.2, margin=0.02),
        "one seed of examples": World("saturating", num_examples=120),
        "one seed of accuracy": World("saturating", "accuracy", num_examples=120),
        "one seed, no token loss": World("saturating", num_examples=120, token_loss=False),
        "examples and seeds": World("saturating", num_examples=100, seeds=(0, 1, 2), base=1.0),
        "examples and seeds, weighted": World("saturating", num_examples=100, seeds=(0, 1), weighted=True),
        "examples of perplexity": World("slow", "perplexity", num_examples=80, seeds=(0, 1)),
        "noisy examples": World("saturating", num_examples=40, noise=0.05, margin=0.01),
        "noisy examples and seeds": World("slow", num_examples=40, seeds=(0, 1, 2), noise=0.05, margin=0.01),
        "hopeless": World("flat", num_examples=12, seeds=(0, 1), noise=0.5, margin=1e-4),
        "hopeless, no examples": World("flat", seeds=(0, 1), noise=0.5, margin=1e-4),
        "lucky low rank": World("lucky", num_examples=30, seeds=(0, 1), noise=0.08, margin=0.005),
        "base open": World("flat", num_examples=40, noise=0.05, base=0.008, margin=0.01),
        "base open, better": World("flat", num_examples=40, noise=0.05, base=-0.001, margin=0.02),
        "no gain by examples": World("flat", num_examples=100, seeds=(0, 1, 2), base=0.0, margin=0.02),
        "seeds only": World("saturating", seeds=(0, 1, 2)),
        "seeds only, noisy": World("slow", seeds=(0, 1, 2), noise=0.03),
        "rates inside": World("saturating", learning_rates=(1e-3, 3e-4, 3e-3), seeds=(0, 1), num_examples=60),
        "rates at the upper edge": World(
            "saturating", learning_rates=(3e-3, 1e-3, 3e-4), seeds=(0, 1), num_examples=60
        ),
        "rates at the edge, rising": World("rising", learning_rates=(3e-3, 1e-3), num_examples=60),
        "rates at the edge, undecided": World(
            "slow", learning_rates=(1e-4, 1e-3), num_examples=20, noise=0.05, margin=0.01
        ),
        "winner of noise": World("flat", learning_rates=(1e-3, 9e-4, 8e-4), seeds=(0, 1), noise=0.02, margin=0.005),
        "missing": World("saturating", missing=(16, 16, 8), num_examples=60),
        "missing seeds of one rank": World("saturating", missing=(4,), seeds=(0, 1)),
        "settled order": World("saturating", points=True, num_examples=40),
        "parting": World("slow", points=True, parting=0.2, num_examples=40, seeds=(0, 1), margin=0.06, noise=0.001),
        "parting, higher is better": World("slow", "accuracy", points=True, parting=-0.1, margin=0.03),
        "one seed with points": World("saturating", points=True, num_examples=40),
        "overfitting by examples": World("u_shaped", num_examples=100, seeds=(0, 1, 2), trained=0.1),
        "flat by examples": World("flat", num_examples=200, seeds=(0, 1, 2), margin=0.01),
        "rising by examples": World("rising", num_examples=100, seeds=(0, 1, 2)),
        "large margin": World("saturating", num_examples=60, margin=1.0),
        "rising but open": World("slow", num_examples=60, seeds=(0, 1), noise=0.015, margin=0.006, seed=5),
        "rising, above the margin alone": World(
            "slow", num_examples=60, seeds=(0, 1), noise=0.015, margin=0.008, seed=3
        ),
        "many ranks": World(
            "slow", ranks=(1, 2, 4, 8, 16, 32, 64, 128, 256), num_examples=60, seeds=(0, 1), margin=0.02
        ),
    }
    generator = np.random.default_rng(2024)
    return chosen_worlds | {f"drawn {number}": draw_world(generator, number) for number in range(48)}


def build_uneven_worlds() -> dict[str, World]:
    generator = np.random.default_rng(2027)
    return {f"uneven {number}": draw_uneven_world(generator, number) for number in range(UNEVEN)}


def draw_uneven_world(generator: np.random.Generator, number: int) -> World:
    """Draw a world whose trainings lack seeds, end far off, differ in length, or stop at other evaluations."""
    world, pick = draw_world(generator, 48 + number), generator.choice
    return replace(
        world,
        seeds=((0, 1), (0, 1, 2), (3, 1, 0, 2))[int(generator.integers(3))] if world.std is None else world.seeds,
        absent=float(pick([0.0, 0.2, 0.4])),
        far=float(pick([0.0, 0.0, 0.05, 3.0])),
        group=int(pick([1, 2, 5])),
        lengths=((), (), (100,), (100, 60))[int(generator.integers(4))],
        stopped_rates=((), (3e-5, 1e-2), (1e-2,))[int(generator.integers(3))],
        checkpoint=("last", "best")[int(generator.integers(2))],
        confidence=float(pick([0.6, 0.6, 0.95])),
        parting=float(pick([-0.3, 0.2])),
    )


def draw_world(generator: np.random.Generator, number: int) -> World:
    names = list(CURVES)
    metric = METRICS[int(generator.integers(len(METRICS)))]
    num_examples = int(generator.choice([0, 0, 25, 60]))
    return World(
        curve=names[int(generator.integers(len(names)))],
        metric=metric[0],
        ranks=tuple(2**power for power in range(int(generator.integers(2)), int(generator.integers(3, 8)))),
        learning_rates=((1e-3,), (1e-3, 3e-3), (3e-4, 1e-4, 1e-3))[int(generator.integers(3))],
        seeds=((0,), (0, 1), (0, 1, 2))[int(generator.integers(3))],
        num_examples=num_examples,
        noise=float(generator.choice([0.001, 0.01, 0.04])),
        base=float(generator.choice([0.001, 0.5])) if generator.random() < 0.4 else None,
        std=float(metric[3] * generator.choice([0.001, 0.02]))
        if num_examples == 0 and generator.random() < 0.3
        else None,
        margin=None if generator.random() < 0.5 else float(metric[3] * generator.choice([0.002, 0.02, 0.1])),
        weighted=bool(generator.random() < 0.3),
        points=bool(generator.random() < 0.3),
        parting=float(generator.choice([-0.05, 0.05, 0.2])),
        trained=float(generator.choice([-0.1, 0.1])) if generator.random() < 0.4 else None,
        seed=number,
    )


def require_equal(actual: Any, expected: Any, path: str) -> None:
    """Require equal values, up to rounding errors."""
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), path
        for key in expected:
            require_equal(actual[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(actual) == len(expected), path
        for number, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            require_equal(ours, theirs, f"{path}.{number}")
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=1e-6, abs=1e-9), path
    else:
        assert actual == expected, path


def round_numbers(value: Any) -> Any:
    """Round all numbers to nine digits, the precision of the comparison."""
    if isinstance(value, dict):
        return {key: round_numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [round_numbers(inner) for inner in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value
