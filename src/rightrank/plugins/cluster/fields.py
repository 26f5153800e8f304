"""How workers are reached and watched; where trainings run changes nothing that they find."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from rightrank.schema.setting_table import Group, Settings, setting

if TYPE_CHECKING:
    from rightrank.schema.settings import SelectSettings


class SelectionFields(Settings):
    """Fields of `SelectSettings`."""

    executor: str
    ray_address: str | None = setting(
        None,
        Group.MACHINE,
        "`HOST:PORT` of a Ray cluster's head; by default one that runs on this machine, else a new one",
        identity=False,
    )
    hang_seconds: float = setting(
        600.0,
        Group.MACHINE,
        "a worker without a step for longer than this, and than 20 of its longest steps, is replaced",
        identity=False,
        gt=0,
    )

    def _require_consistent(self) -> None:
        if self.ray_address and self.executor != "ray":
            raise ValueError(f"ray_address was given and the executor is {self.executor!r}: give executor ray")


def fields_of(settings: SelectSettings) -> SelectionFields:
    """The settings as those of this plug-in, which are a part of theirs."""
    return cast(SelectionFields, settings)
