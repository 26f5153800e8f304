"""Many adapters of one server at one rank: the smallest to which all can be truncated within the margin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rightrank.runs.plugins import Plugin

if TYPE_CHECKING:
    import click

    from rightrank.plugins.fleet.common_rank import Fleet
    from rightrank.schema.settings import SelectSettings


class FleetPlugin(Plugin):
    name = "fleet"

    def commands(self) -> Sequence[click.Command]:
        from rightrank.plugins.fleet import commands

        return [commands.fleet]

    def functions(self) -> Mapping[str, Callable[..., Any]]:
        return {"fleet": fleet}


PLUGIN = FleetPlugin()


def fleet(
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    model: str,
    data: str | Path | Sequence[str | Path],
    settings: SelectSettings | None = None,
    pad: bool = False,
    ignore_base_name: bool = False,
    notice: Callable[[str], None] = lambda _: None,
) -> Fleet:
    """Bring several adapters of one server to the smallest rank at which none loses more than the margin.

    Args:
        adapters: two adapter folders or more, of one base.
        out: the folder to write, which must not exist: one folder for each adapter.
        model: the base.
        data: held-out rows for all adapters, or one file for each in their order.
        settings: of evaluation and margin; see `SelectSettings`.
        pad: write every adapter at the one rank that vLLM serves, with one scale.
        ignore_base_name: accept adapters that name another base, if their shapes fit.
        notice: receives each line for a person.

    Raises:
        InputError: an adapter of another base, data that can't be used, adapters without a common module; nothing was written.
    """
    from rightrank.models.places import require_adapter_folder
    from rightrank.schema.settings import make_settings

    for adapter in map(Path, adapters):
        if not adapter.is_file():
            require_adapter_folder(adapter)  # before what brings torch

    from rightrank.plugins.fleet.common_rank import run_fleet

    files = [data] if isinstance(data, str | Path) else list(data)
    return run_fleet(
        [Path(adapter) for adapter in adapters],
        Path(out),
        model=model,
        files=[Path(file) for file in files],
        settings=settings or make_settings({}),
        pad=pad,
        ignore_base_name=ignore_base_name,
        notice=notice,
    )
