"""Commands on a run folder, and what there is on this machine."""

from __future__ import annotations

import json
import shutil
import time
from importlib.util import find_spec
from pathlib import Path

import click

from rightrank.cli.options import names
from rightrank.schema.errors import SettingsError


@click.command(short_help="Show where a run stands.", epilog="Example: rightrank status run --watch")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Follow the run until it is done or no process works on it.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="With --watch: seconds between updates.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the status as one JSON object.")
def status(run: Path, watch: bool, interval: float, as_json: bool) -> None:
    """Report where RUN stands, from another terminal or after its end. Nothing in the folder is written."""
    from rightrank import api
    from rightrank.report.status import status_lines

    if watch and as_json:
        raise SettingsError("--watch and --json were both given: give one of them")
    if watch:
        try:
            _follow(run, interval)
        except KeyboardInterrupt:
            click.echo(f"\nstopped watching; the selection in {run} is not affected", err=True)
            raise click.exceptions.Exit(130) from None
        return
    found = api.status(run)
    if as_json:
        click.echo(found.model_dump_json())
    else:
        click.echo(status_lines(found, shutil.get_terminal_size().columns, colour=False))


def _follow(run: Path, interval: float) -> None:
    """Show the status of RUN until no process works on it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from rightrank import api
    from rightrank.report.status import status_lines

    console = Console()
    plain = not console.is_terminal or console.no_color
    shown = ""
    with Live(console=console, auto_refresh=False, transient=False) as live:
        while True:
            found = api.status(run)
            text = status_lines(found, console.width, colour=not plain)
            if plain and text != shown:
                click.echo(text)
            elif not plain:
                live.update(Text.from_ansi(text), refresh=True)
            shown = text
            if found.state != "running":
                return
            time.sleep(interval)


@click.command(short_help="Show versions, device, memory, disk and extras.", epilog="Example: rightrank doctor --json")
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object.")
@click.option("--path", type=click.Choice(["ms-swift"]), help="Print only the file that this trainer loads.")
def doctor(as_json: bool, path: str | None) -> None:
    """Show versions, device, memory, disk, extras and writable places on one screen."""
    if path is not None:
        spec = find_spec("rightrank.interop.ms_swift")
        assert spec is not None, "a part of this package"
        click.echo(spec.origin)
        return

    from rightrank import api
    from rightrank.runs.machine import doctor_text

    found = api.doctor()
    click.echo(found.model_dump_json() if as_json else doctor_text(found))


TARGETS = (
    *("peft", "trl", "axolotl", "llamafactory", "unsloth", "ms-swift", "vllm", "sglang", "llama.cpp", "ollama"),
    "optuna",
)


@click.command(short_help="Write the report and figures of a run again.", epilog="Example: rightrank report run")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out", type=click.Path(path_type=Path), help="With several runs: the page (default: side-by-side.html)."
)
@click.option(
    "--atlas-row", is_flag=True, help="Print RUN as a row for the atlas of public sweeps; see docs/how-to/atlas.md."
)
@click.option("--json", "as_json", is_flag=True, help="Print the report's path as one JSON object.")
def report(runs: tuple[Path, ...], out: Path | None, atlas_row: bool, as_json: bool) -> None:
    """Write report.html and the figures of RUN again, from its journal alone.

    While a selection runs, the report shows what is known so far. Several runs give one page that shows them side by
    side. --atlas-row writes nothing.
    """
    from rightrank import api

    if atlas_row:
        click.echo(json.dumps(_atlas_row(runs)))
        return
    if len(runs) == 1 and out is not None:
        raise SettingsError("--out goes with several runs: the report of one is RUN/report.html")
    path = api.write_report(runs[0]) if len(runs) == 1 else api.write_side_by_side(runs, out or "side-by-side.html")
    click.echo(json.dumps({"report": str(path)}) if as_json else str(path))


def _atlas_row(runs: tuple[Path, ...]) -> object:
    from rightrank.runs import plugins

    if len(runs) != 1:
        raise SettingsError("--atlas-row goes with one run")
    if (row := plugins.functions().get("atlas_row")) is None:
        raise SettingsError("--atlas-row needs the plug-in `atlas`, which is not installed")
    return row(runs[0])


@click.command(
    short_help="Write an adapter, or settings for a trainer or server.",
    epilog="Example: rightrank export run --to axolotl",
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    shell_complete=names(*TARGETS),
    help=f"{', '.join(TARGETS[:-1])}, or {TARGETS[-1]}.",
)
@click.option("--out", type=click.Path(path_type=Path), help="New folder to write (default: RUN/exports/TARGET).")
@click.option("--pad", is_flag=True, help="For a server: the same function at one rank that it serves and one scale.")
@click.option(
    "--push-to-hub", "repository", metavar="OWNER/NAME", help="With --to peft: upload to a private repository."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def export(run: Path, to: str, out: Path | None, pad: bool, repository: str | None, as_json: bool) -> None:
    """Write what another program needs to train with RUN's rank or to serve its adapter, or the trials for Optuna."""
    from rightrank import api

    exported = api.export(run, to, out, pad=pad, push_to_hub=repository)
    if as_json:
        click.echo(json.dumps(exported.to_json()))
        return
    for note in exported.notes:
        click.echo(f"note: {note}", err=True)
    click.echo(f"cd {exported.folder} && {exported.command}")
    if exported.hub is not None:
        click.echo(exported.hub)


@click.command(short_help="Keep the intact records of a damaged journal.", epilog="Example: rightrank repair run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was kept as one JSON object.")
def repair(run: Path, as_json: bool) -> None:
    """Keep the intact records of RUN's damaged journal, and move the damaged lines to a file of their own.

    `rightrank select` with the same arguments then trains only what is missing.
    """
    from rightrank import api

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
