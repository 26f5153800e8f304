"""TensorBoard event folders, one per training, read by TensorBoard (extra `tensorboard`)."""

from __future__ import annotations

from pathlib import Path

from rightrank.errors import MissingExtraError, ResultsError
from rightrank.io.importers.example_series import series_rows
from rightrank.io.importers.path_settings import settings_from_path
from rightrank.io.rows import Row

PATTERN = "events.out.tfevents.*"


def recognizes(source: Path) -> bool:
    return source.is_dir() and next(source.rglob(PATTERN), None) is not None


def rows(source: Path) -> list[Row]:
    """One row for each step at which scalars were written.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        ResultsError: no scalars.
    """
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise MissingExtraError(
            f"{source}: reading TensorBoard events needs an extra: pip install 'rightrank[tensorboard]'"
        ) from None
    found: list[Row] = []
    for folder in sorted({path.parent for path in source.rglob(PATTERN)}):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
        events.Reload()
        settings = settings_from_path(folder, source)
        steps: dict[int, dict[str, float]] = {}
        for tag in events.Tags()["scalars"]:
            for scalar in events.Scalars(tag):
                steps.setdefault(scalar.step, {})[tag] = scalar.value
        shared = {**settings, "trial": folder.relative_to(source).as_posix()}
        found.extend(series_rows(steps, shared, str(folder)))
    if not found:
        raise ResultsError(f"{source}: the event files hold no scalars; log the held-out loss, such as eval/loss")
    return found
