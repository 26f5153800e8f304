"""How workers are reached and watched; where trainings run changes nothing that they find."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, cast

from rightrank.schema.setting_table import Group, Settings, setting

if TYPE_CHECKING:
    from rightrank.schema.settings import SelectSettings


def _require_store(store: str) -> str:
    """An address that all machines reach, without what must not be stored."""
    scheme, colon, rest = store.partition("://")
    if store and (not colon or not rest or scheme == "memory"):
        raise ValueError(
            f"{store!r} is not an address that several machines can reach: give one such as s3://bucket/runs or file:///mnt/share"
        )
    if re.match(r"[^/]*:[^/]*@", rest) or "?" in rest or "::" in store:
        raise ValueError(
            "an address with credentials, options or chained protocols is refused, because it would be stored: "
            "give SCHEME://PLACE, and credentials through the environment",
        )
    return store


class SelectionFields(Settings):
    """Fields of `SelectSettings`."""

    executor: str
    ray_address: str | None = setting(
        None,
        Group.MACHINE,
        "`HOST:PORT` of a Ray cluster's head; by default one that runs on this machine, else a new one",
        identity=False,
    )
    store: str = setting(
        "",
        Group.MACHINE,
        "fsspec address for what workers leave, where machines share no disk, such as `s3://bucket/runs`",
        identity=False,
        check=_require_store,
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
        if self.store and self.executor == "local":
            raise ValueError("store was given and the executor is 'local': give executor processes or ray")


def fields_of(settings: SelectSettings) -> SelectionFields:
    """The settings as those of this plug-in, which are a part of theirs."""
    return cast(SelectionFields, settings)
