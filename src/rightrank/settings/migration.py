"""Settings of earlier versions: what was renamed, and what a version did before it knew a setting.

A run folder keeps its settings as the version that began it knew them. `migrated` gives them today's names when the
journal is read, so that nothing else has to know the old ones. `rightrank.settings.identity` uses the other two tables
so that a run begun by an earlier version keeps its fingerprint and its trial identities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rightrank.errors import SettingsError

RENAMED: dict[int, dict[str, str]] = {
    3: {"pack_size": "adapters_per_pass", "selection_fraction": "validation_fraction"},
}
"""By schema version of the journal: the settings that the version renamed, old name → new name."""

BEHAVIOUR_BEFORE: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
"""What versions did that did not know a setting, where it is not the setting's default."""

IDENTITY_NAMES = {"validation_fraction": "selection_fraction"}
"""The names that fingerprints are computed with, where a setting was renamed: a new name is no new selection."""


def migrated(settings: Mapping[str, Any], schema_version: int) -> dict[str, Any]:
    """The settings of a run folder written at `schema_version`, under today's names."""
    names = renamed_since(schema_version)
    return {names.get(name, name): value for name, value in settings.items()}


def renamed_since(schema_version: int) -> dict[str, str]:
    """Old name → today's name, of the settings renamed after `schema_version`."""
    return {old: new for version, names in RENAMED.items() if version > schema_version for old, new in names.items()}


def current_names(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """`(values under today's names, one line for each old name that was used)`.

    Raises:
        SettingsError: a setting was given under both names.
    """
    found, notices = dict(values), []
    for old, new in renamed_since(0).items():
        if old not in found:
            continue
        if new in found:
            raise SettingsError(f"{old} and {new} are one setting: give {new} alone")
        found[new] = found.pop(old)
        notices.append(f"{old} is now called {new}; the old name is still read")
    return found, notices
