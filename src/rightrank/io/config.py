"""A YAML file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from rightrank.errors import SettingsError
from rightrank.io.reading import UnreadableError, read_text

LARGEST_FILE = 100 * 2**10  # bytes; settings are a page of text


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain values alone: no tags of Python's, and no aliases, whose copies of copies can be without end."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*name) are not read; write the value out")
        return super().compose_node(parent, index)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, names with - read as _.

    Raises:
        SettingsError: no such file, not YAML of plain values, or not a mapping.
    """
    try:
        values = yaml.load(read_text(path, LARGEST_FILE), _PlainLoader)
    except UnreadableError as error:
        raise SettingsError(f"{path}: can't read it ({error}); give a YAML file of settings") from None
    except RecursionError:
        raise SettingsError(f"{path}: nested too deeply; give `name: value` lines") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date or number that looks like one and is none
        raise SettingsError(f"{path}: not YAML ({error})") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: got a {type(values).__name__}; give `name: value` lines")
    return {str(name).replace("-", "_"): value for name, value in values.items()}
