"""A YAML file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rightrank.errors import SettingsError


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, names with - read as _.

    Raises:
        SettingsError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(
            f"{path}: can't read it ({error.strerror or error}); give a YAML file of settings"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: got a {type(values).__name__}; give `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}
