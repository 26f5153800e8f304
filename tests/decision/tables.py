"""Build tables of results for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from rightrank.decision.table import ScoreTable, build_table_from_results
from rightrank.schema.decision import Result, ResultsTable


def build_value_table(
    values: Mapping[int, float], metric: str = "eval_loss", higher: bool = False, std: float | None = None
) -> ScoreTable:
    """Return a table with one number per rank."""
    results = [Result(trial_id=str(rank), rank=rank, value=value, std=std) for rank, value in values.items()]
    return build_table_from_results(
        ResultsTable(metric=metric, higher_is_better=higher, results=results, input_notes=[])
    )


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
                Result(
                    trial_id=f"{rank}-{number}",
                    rank=rank,
                    learning_rate=1e-3 if rank else 0.0,
                    seed=number,
                    value=float(values.mean()),
                    example_values=values.tolist(),
                    train_value=None if train is None else train.get(rank),
                )
            )
    return build_table_from_results(
        ResultsTable(metric="eval_loss", higher_is_better=False, results=results, input_notes=[])
    )
