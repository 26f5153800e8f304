"""Plan before any training, and decide on trainings that have finished."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rightrank.runs.returns import Decided


def decide(
    results: str | Path | Sequence[str | Path] | Iterable[Mapping[str, Any]],
    *,
    metric: str | None = None,
    higher_is_better: bool | None = None,
    margin: float | None = None,
    columns: Mapping[str, str] | None = None,
    horizon_steps: int | None = None,
) -> Decided:
    """Decide on trainings that have finished, whoever ran them.

    Args:
        results: a CSV or JSONL file, a run folder, another tool's results (see docs/how-to/decide.md), or mappings in memory
            with `rank`, `value` and, if there are any, `lr`, `seed`, `std`, `item`; or several run folders of one model
            and data, which are joined.
        metric: the column of the held-out number, or its name where the column is `value`.
        higher_is_better: None for that of a metric with a known name; any other needs it.
        margin: how much worse than the best is still enough, in the metric's unit; None for the metric's default.
        columns: canonical name → column, where a column has an unusual name.
        horizon_steps: the length of training to answer for.

    Raises:
        ResultsError: the table can't be used; the message names file and row.
    """
    from rightrank.api.tables import Question, decide_results

    return decide_results(results, Question(metric, higher_is_better, margin, columns or {}, horizon_steps))
