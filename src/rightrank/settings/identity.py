"""Which settings say what a selection finds, and how those of two calls are compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def settings_of_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among `values` (JSON) that say what a selection finds."""
    return {name: value for name, value in values.items() if name not in NOT_IDENTITY}


def settings_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings whose values differ and matter, one `name: old → new` each."""
    before, after = settings_of_identity(old), settings_of_identity(with_identity_of(new, old))
    return [
        f"{name}: {before.get(name)!r} → {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
