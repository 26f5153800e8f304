"""Commands on a run folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import click

from rightrank.schema.errors import SettingsError


@click.command(short_help="Show where a run stands.", epilog="Example: rightrank status run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
def status(run: Path, as_json: bool) -> None:
    """Report where RUN stands, from another terminal or after its end. Nothing in the folder is written."""
    from rightrank.api import runs as api
    from rightrank.report.status import status_lines

    found = api.status(run)
    click.echo(found.model_dump_json() if as_json else status_lines(found, shutil.get_terminal_size().columns))


TARGETS = ("peft", "trl", "axolotl", "llamafactory", "unsloth", "vllm")


@click.command(short_help="Write the report and figures of a run again.", epilog="Example: rightrank report run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--atlas-row", is_flag=True, help="Print RUN as a row for the atlas of public sweeps; see docs/how-to/atlas.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report's path as one JSON object.")
def report(run: Path, atlas_row: bool, as_json: bool) -> None:
    """Write report.html and the figures of RUN again, from its journal alone.

    While a selection runs, the report shows what is known so far. --atlas-row writes nothing.
    """
    from rightrank.api import runs as api
    from rightrank.runs import plugins

    if atlas_row:
        if (row := plugins.functions().get("atlas_row")) is None:
            raise SettingsError("--atlas-row needs the plug-in `atlas`, which is not installed")
        click.echo(json.dumps(row(run)))
        return
    path = api.write_report(run)
    click.echo(json.dumps({"report": str(path)}) if as_json else str(path))


@click.command(
    short_help="Write an adapter, or settings for a trainer or server.",
    epilog="Example: rightrank export run --to axolotl",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    help=f"{', '.join(TARGETS[:-1])}, or {TARGETS[-1]}.",
)
@click.option("--out", type=click.Path(path_type=Path), help="New folder to write (default: RUN/exports/TARGET).")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def export(run: Path, to: str, out: Path | None, as_json: bool) -> None:
    """Write what another program needs to train with RUN's rank or to serve its adapter."""
    from rightrank.api import runs as api

    exported = api.export(run, to, out)
    if as_json:
        click.echo(json.dumps(exported.to_json()))
        return
    for note in exported.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"cd {exported.folder} && {exported.command}")


@click.command(short_help="Keep the intact records of a damaged journal.", epilog="Example: rightrank repair run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was kept as one JSON object.")
def repair(run: Path, as_json: bool) -> None:
    """Keep the intact records of RUN's damaged journal, and move the damaged lines to a file of their own.

    `rightrank select` with the same arguments then trains only what is missing.
    """
    from rightrank.api import runs as api

    repaired = api.repair(run)
    if as_json:
        aside = None if repaired.aside is None else str(repaired.aside)
        click.echo(json.dumps({"kept": repaired.kept, "set_aside": repaired.set_aside, "file": aside}))
    elif repaired.aside is None:
        click.echo(f"{run}: all {repaired.kept} records are intact; nothing was changed")
    else:
        click.echo(
            f"{run}: {repaired.kept} records kept; damaged lines moved to {repaired.aside}: {repaired.set_aside}"
        )


@click.command(
    short_help="Print the file that a trainer loads.",
    epilog="Example: rightrank path ms-swift",
)
@click.argument("trainer", type=click.Choice(["ms-swift"]))
@click.option("--json", "as_json", is_flag=True, help="Print the path as one JSON object.")
def path(trainer: str, as_json: bool) -> None:
    """Print the path of the file that registers the callback `rightrank` in TRAINER.

    For example: `swift sft … --external_plugins $(rightrank path ms-swift) --callbacks rightrank`.
    """
    found = Path(__file__).parents[1] / "interop" / trainer.replace("-", "_") / "__init__.py"
    click.echo(json.dumps({"path": str(found)}) if as_json else found)
