"""`report`, `export` and `repair`: what can be done with a run that is there."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command(epilog="Example: rightrank report run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report's path as one JSON object.")
def report(run: Path, as_json: bool) -> None:
    """Write report.html and the figures of RUN again, from its journal alone.

    It works while a selection runs, too: the report then shows what is known so far.
    """
    from rightrank import api

    path = api.write_report(run)
    click.echo(json.dumps({"report": str(path)}) if as_json else str(path))


@click.command(epilog="Example: rightrank export run --to axolotl")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--to",
    required=True,
    help="peft, trl, axolotl, llamafactory, unsloth, ms-swift, vllm, sglang, llama.cpp, ollama, or optuna.",
)
@click.option("--out", type=click.Path(path_type=Path), help="New folder to write (default: RUN/exports/TARGET).")
@click.option(
    "--pad", is_flag=True, help="For a server: the adapter at one rank it serves and one scale, same function."
)
@click.option("--push-to-hub", "repository", metavar="OWNER/NAME", help="With --to peft: upload it, private.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as one JSON object.")
def export(run: Path, to: str, out: Path | None, pad: bool, repository: str | None, as_json: bool) -> None:
    """Write what another program needs to train with RUN's rank, or to serve its adapter; or its trials for Optuna."""
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


@click.command(epilog="Example: rightrank repair run")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print what was kept as one JSON object.")
def repair(run: Path, as_json: bool) -> None:
    """Keep the whole records of RUN's journal where some are damaged, and set the damaged lines aside.

    `rightrank select` with the same arguments then trains again only what was lost.
    """
    from rightrank import api

    repaired = api.repair(run)
    if as_json:
        aside = None if repaired.aside is None else str(repaired.aside)
        click.echo(json.dumps({"kept": repaired.kept, "set_aside": repaired.set_aside, "file": aside}))
    elif repaired.aside is None:
        click.echo(f"{run}: all {repaired.kept} records are whole; nothing was changed")
    else:
        click.echo(
            f"{run}: {repaired.kept} records kept; damaged lines set aside in {repaired.aside}: {repaired.set_aside}"
        )
