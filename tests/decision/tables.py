"""Build tables of results for tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rightrank.decision.table import ScoreTable, build_table
from rightrank.schema.trials import EvalPoint, TrialFailed, TrialFinished, TrialOutcome


def make_trial(
    trial_id: str,
    rank: int,
    value: float | None,
    metric: str = "eval_loss",
    learning_rate: float = 0.0,
    seed: int = 0,
    steps: int = 0,
    points: Iterable[tuple[int, float]] = (),
    **fields: Any,
) -> TrialOutcome:
    """Make the outcome of a training in a table; without a value it failed."""
    arm = {"rank": rank, "learning_rate": learning_rate, "lora_alpha": 1, "seed": seed, "steps": steps}
    if value is None:
        return TrialFailed(trial_id=trial_id, **arm, error="error", reason="no result")
    evaluations = [EvalPoint(step=step, value=point) for step, point in points]
    return TrialFinished(trial_id=trial_id, **arm, value=value, metrics={metric: value}, points=evaluations, **fields)


def build_value_table(
    values: Mapping[int, float], metric: str = "eval_loss", higher: bool = False, std: float | None = None
) -> ScoreTable:
    """Return a table with one number per rank."""
    results = [
        make_trial(trial_id=str(rank), rank=rank, value=value, metric=metric, seed_deviation=std)
        for rank, value in values.items()
    ]
    return build_table(results, metric, higher)


def build_example_table(
    losses: Mapping[int, float],
    num_examples: int = 400,
    seeds: Sequence[int] = (0, 1, 2),
    noise: float = 0.02,
    level: float = 0.5,
    train: Mapping[int, float] | None = None,
    seed: int = 0,
) -> ScoreTable:
    """Draw a table of examples × seeds with these true means.

    Examples differ by `level`, and ranks differ on an example by `noise`.
    """
    generator = np.random.default_rng(seed)
    shared = level * generator.standard_normal(num_examples)
    results = []
    for rank, loss in losses.items():
        taste = noise * generator.standard_normal(num_examples)
        for number in seeds if rank else (0,):
            values = loss + shared + taste - taste.mean() + noise * generator.standard_normal(num_examples)
            results.append(
                make_trial(
                    trial_id=f"{rank}-{number}",
                    rank=rank,
                    learning_rate=1e-3 if rank else 0.0,
                    seed=number,
                    value=float(values.mean()),
                    example_scores=values.tolist(),
                    train_value=None if train is None else train.get(rank),
                )
            )
    return build_table(results, "eval_loss", False)
