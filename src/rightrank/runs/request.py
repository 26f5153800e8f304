"""What refuses a selection at once, before torch is imported and before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rightrank.data.files import require_optimizer_extra
from rightrank.data.rows import require_rows
from rightrank.hooks.trackers import require_trackers
from rightrank.models.places import require_model
from rightrank.runs.folder import RunFolder
from rightrank.schema.errors import RunFolderError
from rightrank.schema.events import RunStarted
from rightrank.schema.settings import SCALARS, SelectSettings
from rightrank.search.strategies import make_strategy


def require_same_scalars(folder: RunFolder, settings: SelectSettings) -> None:
    """Refuse a run folder that was begun with another value of a scalar setting that is given, before torch is imported.

    All other differences show once model and data are read.

    Raises:
        RunFolderError: names the settings that differ.
    """
    if not folder.journal.path.is_file():
        return
    first = next(iter(folder.journal.read_settled()), None)  # `read` would move a torn line without a notice
    if not isinstance(first, RunStarted):
        return
    given = settings.model_dump(mode="json", include=set(SCALARS) & settings.model_fields_set)
    changed = [
        f"{name}: {first.settings[name]!r} → {value!r}"
        for name, value in sorted(given.items())
        if name in first.settings and first.settings[name] != value
    ]
    if changed:
        raise made_with_others(folder, changed)


def made_with_others(folder: RunFolder, changed: Sequence[str]) -> RunFolderError:
    """The refusal of a folder whose run was begun with other settings."""
    return RunFolderError(
        f"{folder.path}: made with other settings ({'; '.join(changed)}); give the same settings to resume, or another --out"
    )


def require_request(model: object, data: object, settings: SelectSettings) -> None:
    """Refuse a name that does not exist.

    Args:
        model: a folder, file or hub name; a model in memory is not looked at.
        data: a path or hub name; rows in memory are not looked at.

    Raises:
        SettingsError: an unknown strategy, or one that can't work within its budget.
        DataError: a data file that is missing or of a type that is not read.
        ModelError: a model folder that is missing or holds no model, or a name that the hub does not know.
        MissingExtraError: a tracker or an optimizer that is not installed.
    """
    make_strategy(settings, settings.max_steps or 1)
    require_trackers(settings.report_to)
    require_optimizer_extra(settings)
    for source in (data, settings.validation or None):
        if isinstance(source, str | Path):
            require_rows(Path(source))
    if isinstance(model, str):
        require_model(model)
