"""Count what public rank sweeps found, before any training. The counts do not influence what a selection tries or answers."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rightrank.atlas.counts import (
    DATA_TYPES,
    SIZE_PATTERN,
    Expectation,
    Question,
    build_question,
    classify_metric,
    count_sweeps,
)


def expect(
    model: str | None = None,
    data: str | Path | None = None,
    *,
    task: str | None = None,
    rows: int | None = None,
    metric: str | None = None,
    ranks: Sequence[int] | None = None,
) -> Expectation:
    """Count what public sweeps found for similar models and data, before any training. Uses no network.

    Args:
        model: its name tells the size of the base model; a size such as `1.5B` may stand for it. A data file in its place is read as `data`.
        data: a `.jsonl` or `.csv` file, read for its number of rows and its task family.
        task: the task family, such as `chat`, `language` or `classification`.
        rows: number of training rows.
        metric: `loss`, `accuracy` or another metric.
        ranks: the ranks to count; None for the powers of two up to 256.

    Raises:
        SettingsError: a number or rank is not valid, the task family is unknown, or the data cannot be read.
    """
    if data is None and model is not None and Path(model).suffix in DATA_TYPES:
        model, data = None, model
    question, notes = build_question(model, data, Question(task, classify_metric(metric), rows=rows))
    name = "MODEL" if model is None or SIZE_PATTERN.fullmatch(model) else model
    select = shlex.join(["rightrank", "select", name, str(data or "DATA")])
    return count_sweeps(question, ranks, notes, select)
