"""Rows of the series that a tracker holds. `rightrank` logs scores per example as series `items/NAME`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rightrank.io.rows import Row

PREFIX = "items/"
WEIGHTS = "tokens"


def series_rows(
    steps: Mapping[int, Mapping[str, Any]], shared: Mapping[str, Any], where: str, container: str | None = None
) -> Iterator[Row]:
    """Yield a row for each step of a training, and for each example that it scored.

    Args:
        steps: step → name → value; of the series `items/NAME`, the step is the example's number.
        shared: the fields that all rows of the training have.
        where: the training's name in error messages.
        container: the field that holds the values; None: the values are fields of the row.
    """
    for step, values in sorted(steps.items()):
        scores = {f"eval/{name.removeprefix(PREFIX)}": values[name] for name in values if name.startswith(PREFIX)}
        plain = {name: value for name, value in values.items() if not name.startswith(PREFIX)}
        weight = scores.pop(f"eval/{WEIGHTS}", 1.0)
        for found, place, what in (
            (plain, {"step": step}, "step"),
            (scores, {"item": f"{step:06d}", "tokens": weight}, "example"),
        ):
            if found:
                fields = found if container is None else {container: found}
                yield Row({**shared, **place, **fields}, f"{where}: {what} {step}")
