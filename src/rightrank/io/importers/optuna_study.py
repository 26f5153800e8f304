"""An Optuna study in a SQLite file, read by Optuna (extra `optuna`)."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rightrank.errors import MissingExtraError, ResultsError, first_line
from rightrank.io.reading import LIBRARY_ERRORS
from rightrank.io.rows import Row

if TYPE_CHECKING:
    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial

Connect: TypeAlias = Callable[[], sqlite3.Connection]


def rows(source: Path, connect: Connect) -> list[Row]:
    """One row per trial, read through `connect`, which must not allow writes.

    Raises:
        MissingExtraError: Optuna is not installed.
        ResultsError: Optuna can't read the file, or it holds several studies or objectives.
    """
    names, directions, trials = _load(source, connect)
    if len(names) != 1:
        raise ResultsError(f"{source}: {len(names)} studies ({', '.join(names) or 'none'}); give a file with one study")
    if len(directions) > 1:
        raise ResultsError(
            f"{source}: the study has {len(directions)} objectives; give a study with a single objective"
        )
    higher = directions[0].name == "MAXIMIZE"
    return [
        Row(
            {
                "user_attrs": trial.user_attrs,
                "params": trial.params,
                "value": trial.value,
                "higher_is_better": higher,
                "trial": f"trial {trial.number}",
                "status": trial.state.name,
            },
            f"{source}: trial {trial.number}",
        )
        for trial in trials
    ]


def _load(source: Path, connect: Connect) -> tuple[list[str], list[StudyDirection], list[FrozenTrial]]:
    """The names of all studies; where there is one, its directions and trials."""
    try:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError
        from sqlalchemy.pool import StaticPool
    except ImportError:
        raise MissingExtraError(
            f"{source}: reading an Optuna study needs an extra: pip install 'rightrank[optuna]'"
        ) from None
    try:
        storage = optuna.storages.RDBStorage(
            "sqlite://", {"creator": connect, "poolclass": StaticPool}, skip_table_creation=True
        )
        try:
            names = [study.study_name for study in storage.get_all_studies()]
            if len(names) != 1:
                return names, [], []
            study = optuna.load_study(study_name=names[0], storage=storage)
            return names, study.directions, study.trials
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (optuna.exceptions.OptunaError, SQLAlchemyError, *LIBRARY_ERRORS) as error:
        raise ResultsError(f"{source}: Optuna can't read it ({first_line(error)}); restore the file") from None
