"""A YAML file of several selections on one model, one data set each."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rightrank.errors import SettingsError
from rightrank.io.config import read_config

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_JOB_SHAPE = "give `NAME: DATA`, or `NAME:` with `data:` and settings below it"


@dataclass(frozen=True, slots=True)
class MatrixJob:
    """One selection; `settings` are the file's settings, overridden by the job's."""

    name: str  # also the name of its folder
    data: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MatrixConfig:
    model: str
    jobs: tuple[MatrixJob, ...]


def read_matrix(path: Path) -> MatrixConfig:
    """Read the selections of a YAML file. Relative paths in it start at the current folder.

    Raises:
        SettingsError: no such file, not YAML, no model, no jobs, or a job without data or with an invalid name.
    """
    values = read_config(path)
    model, jobs = values.pop("model", None), values.pop("jobs", None)
    if not isinstance(model, str):
        raise SettingsError(f"{path}: got model {model!r}; give `model:` with a folder, a file or a hub name")
    if not isinstance(jobs, dict) or not jobs:
        raise SettingsError(f"{path}: got jobs {jobs!r}; {_JOB_SHAPE}, below `jobs:`")
    return MatrixConfig(model, tuple(_job(path, name, value, values) for name, value in jobs.items()))


def _job(path: Path, name: object, value: object, shared: Mapping[str, Any]) -> MatrixJob:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SettingsError(
            f"{path}: job {name!r}: a job's name is its folder's; use letters, digits, '_', '-' and '.'"
        )
    if isinstance(value, str):
        return MatrixJob(name, value, shared)
    if not isinstance(value, dict) or not isinstance(value.get("data"), str):
        raise SettingsError(f"{path}: job {name!r}: got {value!r}; {_JOB_SHAPE}")
    own = {str(key).replace("-", "_"): setting for key, setting in value.items() if key != "data"}
    return MatrixJob(name, value["data"], {**shared, **own})
