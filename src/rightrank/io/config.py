"""A YAML file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rightrank.errors import SettingsError
from rightrank.io.reading import UnreadableError, parse_yaml, read_text

MAX_FILE_BYTES = 100 * 2**10


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file; `-` in names is read as `_`.

    Raises:
        SettingsError: no such file, not YAML of plain values, or not a mapping.
    """
    try:
        text = read_text(path, MAX_FILE_BYTES)
    except UnreadableError as error:
        raise SettingsError(f"{path}: can't read it ({error}); give a YAML file of settings") from None
    try:
        values = parse_yaml(text)
    except UnreadableError as error:
        raise SettingsError(f"{path}: not YAML of plain values ({error}); give `name: value` lines") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: got a {type(values).__name__}; give `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}
