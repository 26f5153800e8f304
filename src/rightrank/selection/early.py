"""What refuses a selection at once, before torch is imported and before anything is loaded."""

from __future__ import annotations

from pathlib import Path

from rightrank.io.extras import require_optimizer_extra
from rightrank.io.model_source import require_model
from rightrank.io.rows import require_rows
from rightrank.settings import SelectSettings
from rightrank.strategies import make_strategy
from rightrank.trackers import require_trackers


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
