"""Which settings say what a selection finds, and how those of an earlier version are compared with today's."""

from __future__ import annotations

from collections.abc import Container, Mapping, Set
from pathlib import Path
from typing import Any

from rightrank.settings.migration import BEHAVIOUR_BEFORE, IDENTITY_NAMES
from rightrank.settings.select import SelectSettings

# Where trainings run.
PLACEMENT = (
    "executor", "workers", "devices_per_arm", "ray_address", "launcher", "store", "adapters_per_pass", "hang_seconds",
)  # fmt: skip
# Settings that change how a selection runs and not what it finds: they may differ when a run is resumed.
NOT_IDENTITY = (
    *PLACEMENT, "goal", "extend", "guard", "guard_margin", "certify", "checkpoint_seconds", "memory_bytes",
    "metric_timeout_seconds", "report_to", "shard_base",
)  # fmt: skip
# Settings that choose trials and judge them, and change no trial: a run folder may be continued with other values.
CONTINUABLE = (
    "margin", "ranks", "learning_rates", "seeds", "strategy", "sweep", "eval_items", "budget_trainings", "budget_steps",
    "budget_hours",
)  # fmt: skip


def with_identity_of(values: Mapping[str, Any], begun: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of the begun run where a difference makes no other run: the same trials keep their identity.

    Two spellings of one path, such as `model` and `./model`, are the same.
    """
    kept = {name: begun[name] for name in CONTINUABLE if name in begun}
    for name in ("model", "data", "validation"):
        if name in begun and _is_same_place(values.get(name), begun[name]):
            kept[name] = begun[name]
    return {**values, **kept}


def _is_same_place(one: object, other: object) -> bool:
    if not isinstance(one, str) or not isinstance(other, str):
        return False
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def as_begun(settings: SelectSettings, known: Set[str]) -> SelectSettings:
    """The settings with which to resume a run begun by a version that knew the settings named `known`."""
    before = {name: value for name, value in BEHAVIOUR_BEFORE.items() if name not in known | settings.model_fields_set}
    return settings.model_copy(update=before)


def settings_of_identity(values: Mapping[str, Any], known: Container[str] | None = None) -> dict[str, Any]:
    """The settings among `values` (JSON) that say what a selection finds, under the names that fingerprints use.

    `known` names the settings that the version that began the run knew. A setting that it did not know is left out
    where its value is what that version did, so that the run keeps its fingerprint under a version with more settings.
    """
    defaults = SelectSettings().model_dump(mode="json") | BEHAVIOUR_BEFORE
    return {
        IDENTITY_NAMES.get(name, name): value
        for name, value in values.items()
        if name not in NOT_IDENTITY
        and (known is None or name in known or name not in defaults or value != defaults[name])
    }


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings whose values differ and matter, one `name: old → new` each."""
    before, after = settings_of_identity(old), settings_of_identity(with_identity_of(new, old), old)
    shown = {identity: name for name, identity in IDENTITY_NAMES.items()}
    return [
        f"{shown.get(name, name)}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
